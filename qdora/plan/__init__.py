"""The memory and time of a run, worked out before anything is loaded."""
