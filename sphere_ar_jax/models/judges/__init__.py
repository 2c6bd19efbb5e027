"""Networks that judge images while a tokenizer is trained: discriminators, and LPIPS."""
