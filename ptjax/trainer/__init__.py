"""A run from its settings to `results.json`: the only room with I/O and a clock."""
