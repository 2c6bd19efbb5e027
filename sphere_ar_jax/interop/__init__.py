"""Files of PyTorch that others have published: reading them, and writing their names."""
