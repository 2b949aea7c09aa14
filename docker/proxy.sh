#!/bin/sh
# proxy.sh CONF CERTS LISTEN TO
#
# Runs nginx with a configuration beside this script (gate.conf or egress.conf), and has it read its certificates again
# where one has changed or the host behind it has another address: a renewal needs no restart. Once a day the log has
# the days that each certificate is still valid.
#   CERTS    the folder with them: of `fedmeta certs`, OUT/server for the gate, OUT/sites/NAME for an egress
#   LISTEN   [HOST:]PORT to listen on
#   TO       HOST:PORT to pass requests on to
set -eu
[ $# = 4 ] || { echo "usage: proxy.sh CONF CERTS LISTEN TO" >&2; exit 2; }
conf=$1 certs=$(cd "$2" && pwd) listen=$3 to=$4 name=${4%:*}
case $conf in */*) ;; *) conf=$(dirname "$(readlink -f "$0")")/$conf ;; esac
nginx=$(command -v nginx || echo /usr/sbin/nginx)
temp=$(mktemp -d)
sed -e "s|@TEMP@|$temp|g" -e "s|@CERTS@|$certs|g" -e "s|@LISTEN@|$listen|g" -e "s|@TO@|$to|g" \
    "$conf" >"$temp/nginx.conf"
stand() { cat "$certs"/*.crt "$certs"/*.key "$certs"/*.pem "$certs"/public/*.crt 2>/dev/null | cksum; getent ahosts "$name" || true; }
until getent ahosts "$name" >/dev/null; do echo "proxy: waiting for the name $name" >&2; sleep 1; done
"$nginx" -c "$temp/nginx.conf" -e stderr &
nginx_pid=$!
trap 'kill "$nginx_pid" 2>/dev/null' TERM INT
trap 'kill "$nginx_pid" 2>/dev/null; rm -rf "$temp"' EXIT
seen=$(stand) day=0
while kill -0 "$nginx_pid" 2>/dev/null; do
    today=$(date +%j)
    [ "$today" = "$day" ] || { day=$today; python3 -m fedmeta.certs "$certs" >&2 || true; }
    sleep "${FEDMETA_RELOAD_S:-10}" &
    wait $! || true
    now=$(stand)
    if [ "$now" != "$seen" ]; then
        # Half of a renewal is no certificate: what nginx cannot read it does not take, and is asked again.
        if "$nginx" -t -q -c "$temp/nginx.conf" -e stderr; then
            kill -HUP "$nginx_pid" && seen=$now && echo "proxy: certificates are read again" >&2
        fi
    fi
done
wait "$nginx_pid"
