"""Predicts, without a slice, whether a run fits it and how long a step takes."""
