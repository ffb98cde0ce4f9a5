"""Evaluation: sweeps over methods and alphas, their statistics, operating points and reports."""

__all__ = ["calibrate", "grid", "operating_points", "sweep"]
