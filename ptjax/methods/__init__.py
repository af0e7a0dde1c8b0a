"""What trains, one file per method; `base` has the protocol."""
