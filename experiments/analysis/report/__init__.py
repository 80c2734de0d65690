"""The results as one page that needs no network: `build` makes it from what is on disk."""

from experiments.analysis.report.page import build

__all__ = ["build"]
