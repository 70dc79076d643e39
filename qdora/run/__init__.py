"""One run from start to end: build, train, write, load again, evaluate."""
