"""Inference with tuned prompts: logits, generated texts and likelihoods of labels."""
