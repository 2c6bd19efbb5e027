"""What a training reads, and what is checked of it before anything is trained."""
