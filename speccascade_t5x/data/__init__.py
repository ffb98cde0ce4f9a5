"""Examples to batches: seqio tasks, tokenised shards, mixtures, packing, and the `cache` job."""

__all__ = ["batching", "cache", "examples", "mixing", "packing", "seqio_tasks", "shards"]
