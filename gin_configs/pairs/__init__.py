"""Gin files that name a drafter and its verifier."""
