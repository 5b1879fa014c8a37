"""When a pool is decided, by what, and the record of it."""
