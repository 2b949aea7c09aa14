"""Taking a site out of a finished run, with proof, and what each site was worth to it."""

from fedmeta.unlearning.certificate import Certificate
from fedmeta.unlearning.retrain import forget, verify, without_site

__all__ = ["Certificate", "forget", "verify", "without_site"]
