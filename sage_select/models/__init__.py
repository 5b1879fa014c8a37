"""What a live model says of some sequences: read once, checked, shared between processes."""
