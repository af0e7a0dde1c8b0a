"""What trains, one file per method."""
