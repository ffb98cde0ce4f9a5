"""What speculation gains before it is run: cost model, measured probes, plans, and rooflines of slices."""

__all__ = ["cost_model", "plan", "slice_plan"]
