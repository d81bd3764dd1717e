"""Checkpoint to checkpoint changes: depth up-scaling."""
