"""Ways to go on with a prompt: ours, those of stock transformers, and other rivals."""
