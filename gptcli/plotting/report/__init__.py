"""A run as one HTML page that needs no other file: curves, settings, data, samples."""

from gptcli.plotting.report.page import require_page, write_report

__all__ = ["require_page", "write_report"]
