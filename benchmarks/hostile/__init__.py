"""Hostile inputs: seeded mutations of recipes, data files and stored files, judged in processes of their own."""
