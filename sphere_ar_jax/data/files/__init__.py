"""Readers of files of images, a module for each format, and how files are listed."""
