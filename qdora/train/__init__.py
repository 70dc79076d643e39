"""Training: the loop, the optimizer with exact bf16 storage, gates, several processes, checkpoints."""
