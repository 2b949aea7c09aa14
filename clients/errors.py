"""What can go wrong at a node; each has a code that is sent in place of a reply."""

from __future__ import annotations

from fedmeta.errors import FedmetaError


class UnknownSiteError(FedmetaError):
    """A node was asked for a site that it does not host."""


class DataError(FedmetaError):
    """A node cannot read its sites' data."""
