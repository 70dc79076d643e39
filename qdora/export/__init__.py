"""Export a trained model in every form, verify it and audit it."""
