"""`python -m qdora.cli`, which launchers of several processes call."""

from qdora.cli import main

if __name__ == "__main__":
    main()
