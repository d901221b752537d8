"""Tables, plots and a page about runs, made from plain dicts."""

from __future__ import annotations

from gatedconv.report.tables import comparison_table, figures_table, runs_table

__all__ = ["comparison_table", "figures_table", "runs_table"]
