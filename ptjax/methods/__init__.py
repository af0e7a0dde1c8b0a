"""Methods: which variables are trained and how, one file each; `base` has the protocol."""
