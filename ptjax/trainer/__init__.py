"""Runs training, from the settings to `results.json`: the loop, its checkpoints and its files."""
