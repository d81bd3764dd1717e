"""What a model can do: loss per domain and the pictures drawn from it."""
