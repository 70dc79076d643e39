"""Low-bit weights: their formats, quantising, dense tiles, bitsandbytes' kernels and checkpoints."""
