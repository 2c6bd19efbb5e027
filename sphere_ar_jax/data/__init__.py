"""Labelled images: sources, their augmentation, and the batches that training reads."""
