"""Evaluation: log-likelihood of choices, perplexity, generation, the suite over tasks."""
