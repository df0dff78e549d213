"""Perplexity of a long text, by method."""
