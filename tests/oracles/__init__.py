"""Slow, obvious numpy versions of what the package computes, written apart from it.

Nothing in this folder imports the package or jax. Everything is float64 and one prefix at a time.
"""
