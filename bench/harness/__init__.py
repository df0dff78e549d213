"""lm-evaluation-harness over a model that retrieves."""
