"""One page about a run or a comparison, to share: HTML that opens without a network, and Markdown beside it."""

from fedmeta.report.export import export
from fedmeta.report.writing import write

__all__ = ["export", "write"]
