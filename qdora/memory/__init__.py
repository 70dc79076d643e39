"""How many bytes a run needs."""
