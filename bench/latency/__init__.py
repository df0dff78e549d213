"""Time of a decode step, by length of the context."""
