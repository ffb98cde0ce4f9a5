"""Evaluation: sweeps over methods and alphas, their statistics, operating points and reports."""
