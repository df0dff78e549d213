"""Peaks of every phase beside what was planned."""
