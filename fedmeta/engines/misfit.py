"""Why an engine does not compute a model or a learner; another one does."""

from fedmeta.errors import FedmetaError


class UnsupportedModelError(FedmetaError):
    """Why a model or a learner cannot be computed in this way."""
