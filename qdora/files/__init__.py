"""What a run leaves on disk and what it says about its machine: run directory, atomic writes, environment, console."""
