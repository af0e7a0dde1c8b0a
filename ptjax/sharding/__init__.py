"""Meshes, and where on them arrays live."""
