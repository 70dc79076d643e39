"""Data: sources, tasks, tokenisation, the mix, packing and the loader."""
