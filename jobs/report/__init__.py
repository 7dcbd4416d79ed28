"""What a run leaves for people to read: summary.json, report.html and the dataset card, from its statistics.

They can be written at any time, also while the run is going. Nothing here runs a model or changes what the run made.
"""

from jobs.report.builder import SUMMARY_EVERY_S, read_summary, write_report, write_summary
from jobs.report.collect import collect_statistics

__all__ = ["SUMMARY_EVERY_S", "collect_statistics", "read_summary", "write_report", "write_summary"]
