#!/bin/sh
# Waits for the files that a service needs, named in FEDMETA_NEEDS, and becomes the service's command.
for file in $FEDMETA_NEEDS; do
    [ -r "$file" ] || echo "fedmeta: waiting for $file (not there, or not readable by user $(id -u))"
    while ! [ -r "$file" ]; do sleep 1; done
done
exec "$@"
