"""What an index finds, for which time and bytes."""
