"""Frozen backbones: opened, loaded, saved, described."""
