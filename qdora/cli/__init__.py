"""The command line: `app` has the verbs, `verb` how each of them runs."""

from qdora.cli.app import VERBS, app, main, set_up

__all__ = ["VERBS", "app", "main", "set_up"]
