"""The training of the embedded model; not in the wheel, it runs from a checkout."""
