"""`speccascade methods`: lists every execution, rule and drafter, with the meaning of alpha and the source."""

from __future__ import annotations

import argparse
import sys

from speccascade_t5x.cli import gin_flags, terminal
from speccascade_t5x.core import rules
from speccascade_t5x.inference import drafters, methods


def main(argv: list[str]) -> int:
    """Prints the three lists. Returns the exit code."""
    gin_flags.split(argparse.ArgumentParser(prog="speccascade methods", description=__doc__), argv)
    from rich.table import Table

    console = terminal.console()

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), show_edge=False)
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    executions = table("Executions (--method)", "name", "what it does", "reads", "source")
    for name, method in methods.METHODS.items():
        executions.add_row(name, method.what, ", ".join(method.reads) or "-", method.source)
    listed = table("Rules (--rule, --alpha)", "name", "alpha", "meaning of its ends", "source")
    for name in rules.names():
        cls = rules.get(name)
        alpha = "none" if cls.alpha_range is None else rules.describe_range(cls)
        listed.add_row(name, alpha, cls.ends or "-", cls.source)
    proposing = table("Drafters (--drafter)", "name", "what it does", "reads", "source")
    for name, kind in drafters.DRAFTERS.items():
        proposing.add_row(name, kind.what, ", ".join(kind.reads), kind.source)
    for part in (executions, listed, proposing):
        console.print(part)
        console.print()
    console.print("Alphas are not comparable across rules: sweep each on its own grid.")
    return 0


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade methods"))
