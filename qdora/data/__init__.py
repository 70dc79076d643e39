"""Data: tasks, sources, tokenisation, the mix and the loader."""
