"""What the programs cost: time, operations, memory and traffic, measured or counted."""
