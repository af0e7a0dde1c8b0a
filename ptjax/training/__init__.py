"""The mathematics of training: freeze map, loss, optimizer, step. Pure; no Flax, no I/O."""
