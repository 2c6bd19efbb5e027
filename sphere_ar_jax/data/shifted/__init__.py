"""Images unlike those that a model was trained on: corrupted ones, and folders of other styles."""
