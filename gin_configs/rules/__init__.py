"""Gin files that choose a rule and its trade-off."""
