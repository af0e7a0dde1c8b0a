"""Runs training from its settings to `results.json`; it alone writes the files of a run."""
