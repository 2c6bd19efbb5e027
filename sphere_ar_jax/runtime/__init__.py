"""The machine: its devices and processes, checkpoints, files, and what the console shows."""
