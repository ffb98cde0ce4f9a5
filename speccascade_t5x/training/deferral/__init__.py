"""The `train_deferral` job: both models over labelled text, features, heads and calibrations."""

__all__ = ["train_deferral"]
