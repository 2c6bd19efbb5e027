"""What each --mode of `main` does, and the checks of the doctor."""
