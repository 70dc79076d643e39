"""Models: found, read, quantised, pruned, placed and adapted."""
