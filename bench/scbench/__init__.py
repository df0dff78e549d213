"""SCBench's tasks: several turns about one context."""
