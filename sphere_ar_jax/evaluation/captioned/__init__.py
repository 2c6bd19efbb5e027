"""Scores and prompts of runs whose images are drawn for texts."""
