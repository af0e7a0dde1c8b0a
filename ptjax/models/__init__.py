"""The network: T5 as T5X writes it, and the soft prompt in front of it."""
