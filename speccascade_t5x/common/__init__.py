"""Options, files, JSON, fingerprints and paths: what every room needs and no model is in."""

__all__: list[str] = []
