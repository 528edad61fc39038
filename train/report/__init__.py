"""Metrics of a run, and the report page with its charts. The live console belongs in run/."""
