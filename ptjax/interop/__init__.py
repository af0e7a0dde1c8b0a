"""Foreign formats: weights and prompts of T5X, Hugging Face, PEFT in; prompts and weights out."""
