"""Meshes and who holds which part of an array; several hosts; what collectives a program has."""

from speccascade_t5x.distributed.partitioning import Partitioning, Topology

__all__ = ["Partitioning", "Topology"]
