"""Meshes of devices, and how arrays are sharded over them."""
