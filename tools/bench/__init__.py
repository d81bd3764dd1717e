"""Measurements: ratios of two sides in one run, both printed."""
