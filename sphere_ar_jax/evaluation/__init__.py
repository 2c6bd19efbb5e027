"""Scores, pictures and the report page of a run."""
