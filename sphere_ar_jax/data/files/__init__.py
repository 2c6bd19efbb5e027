"""How files of images are found: what counts as one, and where a tar has them."""
