"""The mathematics, in plain jax.numpy: distributions, rules, verification, stopping and counting.

Nothing here knows of models, meshes, files or flax. Every function is jittable and free of side effects.
"""

__all__ = ["accounting", "divergences", "probs", "rules", "stopping", "verify"]
