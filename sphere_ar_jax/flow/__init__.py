"""Rectified flow from noise to data: its path, guidance, solvers and sampling plans."""
