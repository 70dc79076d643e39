"""Evaluation: log-likelihood of choices, perplexity, the suite over tasks."""
