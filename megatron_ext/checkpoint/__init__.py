"""Saving and loading of training state, and what makes a checkpoint trustworthy."""
