"""Reads and writes weights and prompts in the formats of T5X, Hugging Face, PEFT and ptjax."""
