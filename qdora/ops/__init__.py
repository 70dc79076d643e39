"""Pure functions on tensors: quantisers, the DoRA algebra, losses. Nothing here imports the rest of qdora."""
