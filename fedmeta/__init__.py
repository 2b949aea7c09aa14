"""Federated meta-learning: a start from which every site, also a new one, adapts in a few steps."""

from fedmeta.task import Task

__all__ = ["Task"]
__version__ = "0.1.0"
