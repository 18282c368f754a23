"""Models by other people: how many of them can be traced, trimmed exactly, and how much of each is within reach."""
