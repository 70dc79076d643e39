"""Export a trained model in every form, and verify it."""
