"""Recipes: all settings, their defaults and checks, and reading them from YAML."""
