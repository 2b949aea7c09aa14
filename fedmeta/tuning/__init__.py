"""Searching for settings: which keys of an experiment to vary and how, judged on validation sites alone."""

from fedmeta.tuning.space import Choices, Dimension, Range, Settings, evenly, usual_space, with_settings, words

__all__ = ["Choices", "Dimension", "Range", "Settings", "evenly", "usual_space", "with_settings", "words"]
