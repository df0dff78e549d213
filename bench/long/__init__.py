"""Speed and memory along one long answer."""
