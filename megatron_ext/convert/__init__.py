"""Hugging Face folders to Megatron checkpoints and back, by tables that both directions read."""
