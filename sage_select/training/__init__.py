"""The library's own trainer: settings, one update, the loop, sharding, checkpoints, run folder."""
