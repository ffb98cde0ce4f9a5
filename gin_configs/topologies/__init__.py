"""Gin files of accelerator topologies and their meshes."""
