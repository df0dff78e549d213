"""Keys, values and queries to search in: made up, or captured from a model."""
