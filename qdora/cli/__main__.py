"""python -m qdora.cli, as launchers of several processes call it."""

from qdora.cli import main

main()
