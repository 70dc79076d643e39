"""One short module per verb of the command line: where the stages of a run meet."""
