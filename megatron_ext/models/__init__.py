"""What is trained: one architectural idea a file; ``gpt.py`` builds the model."""
