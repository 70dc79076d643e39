"""The command line."""

from qdora.cli.app import VERBS, app, main

__all__ = ["VERBS", "app", "main"]
