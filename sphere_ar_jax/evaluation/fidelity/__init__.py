"""Scores of image sets by the ADM protocol, computed in JAX: FID and its kin."""
