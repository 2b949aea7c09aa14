"""The address of an MLflow store, and the user and password that may stand in it.

They belong into MLflow's own environment variables, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and into no
file, message or table that a run writes. MLflow sends them to servers; stores that are databases are given them here.
"""

import os
import re
import sys
from urllib.parse import quote, unquote

from fedmeta.experiment.sections import Tracking

URI, USER, PASSWORD = "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

_OF_SERVER = re.compile(r"(https?://)(?:([^/?#]*)@)", re.IGNORECASE)
_OF_DATABASE = re.compile(r"([\w+.-]+://)(?:([^:/@?]*(?::[^?]*)?)@)")
_SECRETS = ("user", "username", "password", "passwd", "pwd", "token")


def default_uri() -> str:
    """Returns the store of an experiment that names none: MLFLOW_TRACKING_URI where that is set."""
    return os.environ.get(URI) or str(Tracking.model_fields["uri"].default)


def without_user_info(uri: str) -> str:
    """Returns an address without user and password, also in its query."""
    found = _user_info(uri)
    bare = uri if found is None else uri[: found.end(1)] + uri[found.end() :]
    address, _, query = bare.partition("?")
    pairs = query.split("&")
    kept = [pair for pair in pairs if pair.partition("=")[0].lower() not in _SECRETS]
    if len(kept) == len(pairs):
        return bare
    return f"{address}?{'&'.join(kept)}" if kept else address


def keep_user_info(uri: str) -> str:
    """Moves user and password of an address into the environment, unless it has some, with a note on stderr.

    Returns:
        The address without them.
    """
    found, bare = _user_info(uri), without_user_info(uri)
    if bare == uri:
        return uri
    if found is None:
        note = f"tracking.uri: what its query held of a user or password is left out; set {USER} and {PASSWORD}"
    elif os.environ.get(USER) or os.environ.get(PASSWORD):
        note = f"tracking.uri: its user and password are left out; {USER} and {PASSWORD} are set and used"
    else:
        user, _, password = found[2].partition(":")
        os.environ[USER], os.environ[PASSWORD] = unquote(user), unquote(password)
        note = f"tracking.uri: its user and password are kept out of all files; better set {USER} and {PASSWORD}"
    print(f"fedmeta: note: {note}", file=sys.stderr)
    return bare


def with_user_info(uri: str) -> str:
    """Returns the address of a database with the environment's user and password; that of another store as it is."""
    scheme, found, rest = uri.partition("://")
    user, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    database = scheme.partition("+")[0] in ("postgresql", "mysql", "mssql")
    if not (database and found and user) or _user_info(uri):
        return uri
    return f"{scheme}://{quote(user, safe='')}{':' + quote(password, safe='') if password else ''}@{rest}"


def _user_info(uri: str) -> re.Match[str] | None:
    pattern = _OF_SERVER if uri.lower().startswith(("http://", "https://")) else _OF_DATABASE
    return pattern.match(uri)
