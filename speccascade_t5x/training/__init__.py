"""Training and distilling drafters and verifiers, and counting n-gram tables."""

__all__ = ["losses", "optimizers", "tables", "train", "train_loop"]
