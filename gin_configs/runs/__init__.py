"""Gin files of the verbs: one run each, required bindings in the header."""
