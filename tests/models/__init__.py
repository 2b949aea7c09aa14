"""Tests of fedmeta.models."""
