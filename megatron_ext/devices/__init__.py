"""Where a run runs: CPU over gloo, or CUDA over NCCL."""
