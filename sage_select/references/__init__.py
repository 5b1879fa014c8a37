"""What the reference says, kept on disk and measured once."""
