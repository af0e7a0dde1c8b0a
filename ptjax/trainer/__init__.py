"""A run from its settings to `results.json`. The only package with a clock and files to write."""
