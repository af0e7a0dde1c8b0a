"""Scores a prompt, a model or an ensemble of prompts on a task."""
