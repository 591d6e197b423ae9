"""Pictures of runs: one source of curves, figures for files, the report page."""
