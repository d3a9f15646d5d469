"""The report of runs: one HTML page without anything outside it, from what the runs left."""

from partialfc.records.report.page import write_report
from partialfc.records.report.read import RunFiles, read_run

__all__ = ["RunFiles", "read_run", "write_report"]
