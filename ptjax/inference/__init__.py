"""Tuned prompts at work: generated texts and likelihoods of labels."""
