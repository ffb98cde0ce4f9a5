"""Meshes and the placement of arrays, several hosts, and the collectives of a program."""

from speccascade_t5x.distributed.partitioning import Partitioning, Topology

__all__ = ["Partitioning", "Topology"]
