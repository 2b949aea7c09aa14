"""Where runs are tracked: addresses of stores, checked before anything waits for them."""

import os
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies

from fedmeta.errors import FedmetaError

Value = TypeVar("Value")

SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PORTS = {"http": 80, "https": 443, **DATABASE_PORTS}
# How MLflow behaves where users have not said otherwise: fedmeta tries again by itself, and nothing phones home.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # It logs each error that it raises, with the whole traceback.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
CONNECTION_S = 5.0
OPENING_HTTP_S = 15.0
OPENING_DATABASE_S = 60.0
OPENING_FILE_S = 600.0
"""A file is never out of reach; but to build a new one's tables takes a busy machine minutes."""


def shown(uri: str) -> str:
    """Returns the address without the password that it may hold."""
    parts = urlsplit(uri)
    if parts.password is None:
        return uri
    return urlunsplit(parts._replace(netloc=f"{parts.username}:***@{parts.netloc.rpartition('@')[2]}"))


def sqlite_file(uri: str) -> Path | None:
    """Returns the absolute path of a SQLite store's file, or None for a store of another kind."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).absolute() if uri.startswith(SQLITE) else None


def artifact_folder(uri: str) -> str | None:
    """Returns where a new experiment's artifacts go: beside a SQLite file, else in the working directory.

    None leaves it to an MLflow server.
    """
    if uri.startswith(("http://", "https://")):
        return None
    file = sqlite_file(uri)
    return ((file.parent if file else Path.cwd()) / "mlartifacts").as_uri()


def checked_uri(uri: str) -> str:
    """Checks what can be checked of a store at once, and creates the folder of a SQLite file.

    Returns:
        The address, absolute.

    Raises:
        FedmetaError: the address is malformed, its folder cannot be written, its file is no SQLite database, or its
            database server cannot be reached.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_sqlite(uri, file)
        return f"{SQLITE}{file}"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unusable(uri, str(error)) from error
    dialect = parts.scheme.partition("+")[0]
    if dialect not in PORTS:
        hint = f" (a SQLite file is written {SQLITE}{uri})" if not parts.scheme else ""
        raise _unusable(uri, f"it must begin with {SQLITE}, http://, https:// or postgresql://{hint}")
    if not host:
        raise _unusable(uri, "it names no host")
    if dialect in DATABASE_PORTS or not getproxies():
        _check_listening(uri, host, port or PORTS[dialect])
    return uri


def create_sqlite(uri: str, initialise: Callable[[str], object]) -> None:
    """Creates a SQLite store's file, whole or not at all, where there is none.

    MLflow builds its tables in dozens of steps; a process that dies between two leaves a file that no later one can
    use. So they are built elsewhere, and the file appears at once. Where two do that at once, the first one's is taken.

    Args:
        uri: The store, of any kind.
        initialise: Builds the tables at the address that it is given.
    """
    file = sqlite_file(uri)
    if file is None or file.exists() or not file.parent.is_dir():
        return
    with tempfile.TemporaryDirectory(prefix="fedmeta-") as folder:
        made = Path(folder, "mlflow.db")
        initialise(f"{SQLITE}{made}")
        content = made.read_bytes()
    own = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        own.write_bytes(content)
        with suppress(FileExistsError):
            os.link(own, file)
    except OSError as error:
        raise _unusable(uri, f"{file}: {error.strerror or error}") from error
    finally:
        own.unlink(missing_ok=True)


def within_time(uri: str, call: Callable[[], Value]) -> Value:
    """Calls in a thread of its own, since MLflow goes on trying some stores for a minute and more.

    Raises:
        FedmetaError: the call failed or took too long.
    """
    seconds = OPENING_HTTP_S if uri.startswith("http") else OPENING_DATABASE_S
    seconds = OPENING_FILE_S if uri.startswith(SQLITE) else seconds
    values: list[Value] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            values.append(call())
        except Exception as error:
            errors.append(error)

    thread = Thread(target=attempt, name="fedmeta-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if values:
        return values[0]
    if errors and isinstance(errors[0], FedmetaError):
        raise errors[0]
    raise _unusable(uri, first_line(errors[0]) if errors else f"no answer within {seconds:.0f} s")


def first_line(error: Exception) -> str:
    """Returns an error's reason in one short line: what the network or SQLite said at its bottom, or its first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) and cause.strerror:
            return cause.strerror
        if isinstance(cause, sqlite3.Error):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def say(message: str) -> None:
    """Tells the user what became of tracking."""
    print(f"fedmeta: tracking: {message}", file=sys.stderr)


def _check_sqlite(uri: str, file: Path) -> None:
    if file.name == ":memory:" or file.is_dir():
        raise _unusable(uri, f"it names no file (try {SQLITE}mlflow.db)")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        head = b""
        if file.exists():
            with file.open("rb") as stream:
                head = stream.read(16)
    except OSError as error:
        raise _unusable(uri, f"{error.filename or file}: {error.strerror}") from error
    if head and head != b"SQLite format 3\0":
        raise _unusable(uri, f"{file} is no SQLite database")
    # SQLite keeps its journal beside the file, so the folder must be writable as well.
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise _unusable(uri, f"{place} cannot be written")


def _check_listening(uri: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECTION_S).close()
    except OSError as error:
        raise _unusable(uri, f"nothing answers at {host}:{port} ({error.strerror or error})") from error


def _unusable(uri: str, reason: str) -> FedmetaError:
    return FedmetaError(f'tracking.uri "{shown(uri)}" cannot be used: {reason}')
