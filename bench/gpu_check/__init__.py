"""Everything that wants a GPU, checked and timed."""
