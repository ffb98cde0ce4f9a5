"""TPU slices without a TPU: compile for them from shapes alone, and predict what speculation gains there."""

__all__ = ["precompile"]
