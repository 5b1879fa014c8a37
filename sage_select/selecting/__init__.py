"""Selection during a run: when a pool is scored, which pairs are kept, and the log of decisions."""
