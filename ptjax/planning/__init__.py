"""Whether a run fits a slice, and how long it takes, without the slice."""
