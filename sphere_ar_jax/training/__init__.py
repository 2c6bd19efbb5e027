"""The trainings: their losses, optimizer and state, the loop, and the workdirs they fill."""
