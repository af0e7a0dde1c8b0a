"""Tuning methods: which variables are trained, and how; `base` has their interface."""
