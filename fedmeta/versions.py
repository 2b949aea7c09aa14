"""Which versions of what made a result."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

PACKAGES = ("torch", "flwr", "mlflow", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of fedmeta, Python and the packages that results may depend on, by name."""
    found = {"fedmeta": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a site's or a server's image may do without one
    return found
