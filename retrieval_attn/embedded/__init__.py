"""The small model that ships with the package: weights, tokenizer and card."""
