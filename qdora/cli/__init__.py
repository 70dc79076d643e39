"""The command line."""

from qdora.cli.app import app, main

__all__ = ["app", "main"]
