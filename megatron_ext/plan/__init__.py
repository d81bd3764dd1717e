"""Parameters, FLOPs, memory and time of a layout, from arithmetic and published tables."""
