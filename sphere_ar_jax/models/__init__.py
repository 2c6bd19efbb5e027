"""The tokenizer, the autoregressive model, and the networks that judge images."""
