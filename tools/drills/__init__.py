"""The fault matrix: a real Slurm on one machine, the real trainer, faults injected into both."""
