"""Checks whether a service answers over HTTP: `python -m fedmeta.health URL [CA]`; exit code 0 = it does.

Flower's SuperLink and SuperNode answer at `/health`, in every version that serves HTTP. The certificate is checked
against the authority's file CA; without CA against the system's.
"""

from __future__ import annotations

import ssl
import sys
import urllib.error
import urllib.request

ANSWERS_S = 5.0
BROKEN = 500
"""From this status on, an answer reports that the service cannot do its work."""


def serving(url: str, authority: str | None = None) -> bool:
    """Returns whether a service answers without a server error, under a name that its certificate holds.

    A refusal counts as an answer: the gate refuses whatever shows no certificate.
    """
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=authority)),
    )
    try:
        opener.open(url, timeout=ANSWERS_S).close()
    except urllib.error.HTTPError as error:
        return error.code < BROKEN
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m fedmeta.health URL [CA]")
    sys.exit(0 if serving(*sys.argv[1:]) else 1)
