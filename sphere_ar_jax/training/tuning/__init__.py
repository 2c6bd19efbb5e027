"""Fine-tuning: the weights of another run, parts that stay frozen, and factors of low rank."""
