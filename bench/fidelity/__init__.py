"""Outputs of attention, head by head, beside exact attention."""
