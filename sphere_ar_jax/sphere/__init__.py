"""Geometry and probability distributions on the sphere that tokens live on."""
