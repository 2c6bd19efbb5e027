"""Images with captions: the vocabulary that reads a text, and data sets that have texts."""
