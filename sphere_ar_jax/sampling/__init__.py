"""Sampling of tokens and images: one program, all devices of a mesh, and long runs to a file."""
