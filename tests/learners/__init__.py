"""Tests of fedmeta.learners."""
