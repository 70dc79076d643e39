"""Models: find, read, quantise, prune, place and adapt them."""
