"""Recipes: TOML files read, checked, and edited."""
