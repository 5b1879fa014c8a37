"""Reference log-probs: measured once, kept on disk, or read from a table."""
