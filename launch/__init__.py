"""Entry points: they may know Hydra, Slurm and the file system."""
