"""Comparisons of settings on trained runs, each a list of settings and a table."""
