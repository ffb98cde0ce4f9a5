"""The verbs: `speccascade VERB`, or `python -m speccascade_t5x.cli.VERB`. Each parses and calls one function."""

__all__: list[str] = []
