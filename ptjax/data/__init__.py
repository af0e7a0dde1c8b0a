"""Reads records, makes examples of them, tokenises these and builds batches."""
