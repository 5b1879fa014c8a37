"""One thin file per host."""
