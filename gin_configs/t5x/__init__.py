"""Gin files for T5X's own scripts."""
