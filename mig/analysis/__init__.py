"""What is in a file, all of it, and what is wrong with it: `mig.analyze`."""

from mig.analysis.analyze import analyze
from mig.analysis.report import (
    Analysis,
    BlockCounts,
    CommandItem,
    Finding,
    RamSummary,
    SectionItem,
    Severity,
)

__all__ = [
    "Analysis",
    "BlockCounts",
    "CommandItem",
    "Finding",
    "RamSummary",
    "SectionItem",
    "Severity",
    "analyze",
]
