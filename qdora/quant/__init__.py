"""Pure functions on tensors: quantisers, the DoRA algebra, pruning, losses."""
