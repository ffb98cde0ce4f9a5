"""`speccascade infer`: decodes a seqio task, or lines of text, with a pair.

    speccascade infer --task=restore_de --output_dir=out --rule=token_v3 --alpha=0.3
    speccascade infer --gin_file=runs/infer_restore_de.gin --gin.OUTPUT_DIR="'out'"
    echo "grusse aus munchen" | speccascade infer --input=- --temperature=0

Short flags are bindings: the resolved config.gin beside the output says everything.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.runtime import paths, records

# Short flag -> (type, help). These are macros of runs/infer.gin.
_MACROS = {
    "task": (str, "a registered seqio task"),
    "input": (str, 'a text file, a .jsonl file with "inputs" (and "targets"), or "-", instead of a task'),
    "output_dir": (str, "where records, metrics and config.gin go; without it, predictions go to stdout"),
    "split": (str, "split of the task (default: test)"),
    "limit": (int, "decode only the first so many examples"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
}
# Short flags that are fields of runtime.generate.Settings.
_SETTINGS = {
    "method": (str, '"speculative" (default), "verifier" or "drafter"'),
    "rule": (str, "which rule (default: lossless)"),
    "alpha": (float, "the rule's trade-off"),
    "draft_len": (int, "tokens drafted per round"),
    "verification": (str, '"token" (default) or "block"'),
    "temperature": (float, "0 to 2 (default: 1); 0 takes the argmax"),
    "top_k": (int, "0 is off"),
    "top_p": (float, "1 is off"),
    "min_p": (float, "0 is off"),
    "max_input_len": (int, "longest prompt in tokens"),
    "max_len": (int, "longest output in tokens"),
    "num_samples": (int, "outputs per input"),
    "batch_size": (int, "inputs decoded together"),
    "seed": (int, "of the random key"),
}


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    options, bindings = gin_flags.split(_parser(), argv)
    files = options.gin_file or [_default_file(options.task)]
    shorts = {name.upper(): getattr(options, name) for name in _MACROS}
    shorts |= {f"generate.Settings.{name}": getattr(options, name) for name in _SETTINGS}
    shorts["generate.Settings.truncate"] = options.truncate or None
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), options.gin_search_paths)
    import gin

    from speccascade_t5x.runtime import infer

    job = gin.get_configurable(infer.infer)
    with _progress_bar() as progress:
        result = job(config_text=config_text, progress=progress)
    if result.predictions is None:
        for record in result.records:
            predictions = record["prediction"]
            print(predictions if isinstance(predictions, str) else "\t".join(predictions))
        return 0
    records.write_text(result.predictions.parent / "config.gin", config_text)
    for name, value in result.metrics.items():
        print(f"{name:<26} {value:.4g}")
    print(f"{'tokens/s':<26} {result.timing['tokens_per_s']:g}  (compile {result.timing['compile_s']:g} s apart)")
    print(f"wrote {result.predictions}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speccascade infer",
        description="Decodes a seqio task, or lines of text, with a pair.",
        epilog="Required: --task and --output_dir, or --input. Each flag stands for a gin binding of "
        "runs/infer.gin; --task=NAME reads runs/infer_NAME.gin where that is packaged.",
        allow_abbrev=False,
    )
    for name, (kind, text) in (_MACROS | _SETTINGS).items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--truncate", action="store_true", help="cut longer prompts instead of refusing them")
    gin_flags.add_flags(parser)
    return parser


def _default_file(task: str | None) -> str:
    own = f"runs/infer_{task}.gin"
    return own if task and (paths.gin_configs_dir() / own).is_file() else "runs/infer.gin"


@contextlib.contextmanager
def _progress_bar() -> Iterator[object]:
    """A bar on stderr with examples/s and acceptance; nothing where stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]} examples/s  acceptance {task.fields[acceptance]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=None, speed="-", acceptance="-")

        def advance(examples: int, total: int, rates: Mapping[str, float]) -> None:
            bar.update(row, total=total, advance=examples)
            speed = bar.tasks[row].speed
            acceptance = f"{rates['acceptance']:.3f}" if rates.get("drafter_calls_per_token") else "-"
            bar.update(row, speed=f"{speed:.1f}" if speed else "-", acceptance=acceptance)

        yield advance


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb

    sys.exit(run_verb(main, sys.argv[1:], "speccascade infer"))
