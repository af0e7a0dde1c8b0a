"""The network: T5 with T5X's names and formulas, and the soft prompt before its input."""
