"""One fact in a long text, by length and depth."""
