"""The version of an MLflow store in a database: MLflow migrates an older one in place, without a word and for good.

After that the MLflow that wrote it cannot open it any more, and it may be a whole team's. So a store of another version
is refused, unless the environment variable FEDMETA_UPGRADE_STORE is 1.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from fedmeta.errors import FedmetaError

UPGRADE = "FEDMETA_UPGRADE_STORE"

_QUERY = "SELECT version_num FROM alembic_version"


def refuse_other_version(shown: str, uri: str, file: Path | None = None) -> None:
    """Refuses a database whose tables are of another version than this MLflow's, before MLflow opens it.

    Args:
        shown: The store's address as messages show it, without password.
        uri: Its address.
        file: Its file where it is SQLite; servers of databases are asked through SQLAlchemy.

    Raises:
        FedmetaError: It is of an older or a newer version, and the environment does not allow to migrate it.
    """
    if os.environ.get(UPGRADE) == "1":
        return
    found = _sqlite_revision(file) if file is not None else _database_revision(uri)
    known = revisions()
    if not found or not known or found == known[0]:
        return
    if found in known:
        raise FedmetaError(
            f'tracking.uri "{shown}" cannot be used: an older MLflow made this store (revision {found}); this one '
            "would migrate it in place, and the older one could not open it any more. Copy it, then run: mlflow db "
            f"upgrade {shown} or set {UPGRADE}=1 to have it migrated now"
        )
    raise FedmetaError(
        f'tracking.uri "{shown}" cannot be used: a newer MLflow made this store (revision {found}, unknown here): '
        "install that MLflow, or name another store"
    )


def revisions() -> list[str]:
    """Returns the revisions of its tables that the installed MLflow knows, its own first; none where it names none."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    spec = find_spec("mlflow.store.db_migrations")
    places = list(spec.submodule_search_locations or ()) if spec else []
    try:
        return [script.revision for script in ScriptDirectory(places[0]).walk_revisions()] if places else []
    except (CommandError, OSError):
        return []


def _sqlite_revision(file: Path) -> str:
    """Returns the revision that a file names; empty for a new file, and where it cannot be read."""
    if not file.exists() or not file.stat().st_size:
        return ""
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            row = connection.execute(_QUERY).fetchone()
    except sqlite3.Error:
        return ""
    return str(row[0]) if row else ""


def _database_revision(uri: str) -> str:
    """Returns the revision that a database names; empty for a new one, and where it cannot be read."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    try:
        engine = create_engine(uri)
        with engine.connect() as connection:
            row = connection.execute(text(_QUERY)).fetchone()
        engine.dispose()
    except (SQLAlchemyError, ImportError):
        return ""
    return str(row[0]) if row else ""
