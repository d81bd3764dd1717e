"""Optimizer, learning-rate schedules and batch growth."""
