"""Tables of README.md, by subject."""
