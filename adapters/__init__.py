"""Adapters for trainers: TRL, Lightning and plain PyTorch."""
