"""Gin files of single models: architecture and size."""
