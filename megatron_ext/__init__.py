"""Thin extensions to Megatron-Core for training bilingual language models."""

__version__ = "0.1.0"
