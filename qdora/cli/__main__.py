"""python -m qdora.cli, as launchers of several processes call it."""

from qdora.cli import main

if __name__ == "__main__":
    main()
