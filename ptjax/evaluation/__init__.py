"""Scores of a prompt, a model or an ensemble on a task."""
