"""`speccascade train_deferral`: fits deferral heads, and calibrations of the input of plug-in rules, for a pair.

    speccascade train_deferral --task=restore_de --output_dir=deferral
    speccascade infer --pair=deferral/bundle --rule=learned_gap --alpha=0.2 --input=lines.txt

Short flags are bindings; the config.gin beside the output holds the resolved configuration.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.cli import gin_flags, progress
from speccascade_t5x.inference import records
from speccascade_t5x.training.deferral import train_deferral

# Short flag -> (type, help). These are macros of runs/train_deferral.gin.
_MACROS = {
    "output_dir": (str, "folder for columns, checkpoints, report and bundle; a run found there is continued"),
    "pair": (str, "a bundle's folder, or the name of a packaged one (default: restore_de_pair)"),
    "task": (str, "a registered seqio task to collect labels on"),
    "cached": (str, "a folder of `speccascade cache` for one split, instead of a task"),
    "split": (str, "split of the task (default: validation)"),
    "limit": (int, "collect on the first N examples (default: 4000)"),
    "kind": (str, "kind of head: prefix (the loss gap, for learned_gap) or token (candidates, for learned_token)"),
    "loss": (str, "loss whose gap a prefix head estimates: zero_one or log"),
    "objective": (str, "objective: squared, surrogate or co_llm for a prefix head; likelihood for a token head"),
    "steps": (int, "maximum number of updates (default: 3000)"),
    "batch_size": (int, "number of examples scored together"),
}
_EPILOG = """\
required:
  --output_dir, and --task or --cached

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  OUTPUT_DIR, PAIR, TASK, CACHED, SPLIT, LIMIT, KIND, LOSS, OBJECTIVE, STEPS, BATCH_SIZE
  train_deferral.Data.shares, inputs_len, targets_len, batches_per_part, seed
  train_deferral.HeadOptions.hidden, top, width, layers
  fitting.FitConfig.seeds, folds, learning_rate, weight_decay, batch_size, eval_every, patience, alphas,
    softness
  train_deferral.train_deferral.calibrations, temperature, devices
  l10n.data_dir.path                 folder of the corpus of the tasks restore_de and l10n_en_de

gin files:
  --task=NAME reads runs/train_deferral_NAME.gin if that file is packaged, else runs/train_deferral.gin.

The same command continues a killed run. --kind=token needs --objective=likelihood.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    usage = ("--task=NAME --output_dir=FOLDER [flags]", "--cached=FOLDER --output_dir=FOLDER [flags]")
    description = "Fits a deferral head and calibrations for a pair, and puts them into a copy of its bundle."
    parser = gin_flags.parser("train_deferral", usage, description, _EPILOG, _MACROS)
    parser.add_argument("--no_tensorboard", action="store_true", help="write no TensorBoard files")
    gin_flags.add_flags(parser)
    flags, bindings = gin_flags.split(parser, argv)
    files = flags.gin_file or [gin_flags.default_file("train_deferral", flags.task)]
    shorts = {name.upper(): getattr(flags, name) for name in _MACROS}
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)
    needed = {"train_deferral.train_deferral.data": "begin with a run file, such as --gin_file=runs/train_deferral.gin"}
    job = gin_flags.job(train_deferral.train_deferral, needed)
    import gin

    output_dir = Path(gin.query_parameter("%OUTPUT_DIR"))
    with _observer(None if flags.no_tensorboard else output_dir / "tensorboard") as observer:
        trained = job(config_text=config_text, observer=observer)
    _report(trained, output_dir)
    print(f"wrote {trained.bundle}")
    return 0


def _report(trained: train_deferral.Trained, output_dir: Path) -> None:
    """Evaluates a prefix head on the test split and prints its figures; a token head has no gap to evaluate."""
    for each in trained.summary["seeds"]:
        early = ", stopped early" if each["stopped_early"] else ""
        losses = f"{records.shown(each['left_out'])} (at first {records.shown(each['first'])})"
        print(f"seed {each['seed']}: left-out loss {losses} after {each['kept_at']} of {each['steps']} steps{early}")
    if trained.summary["remark"]:
        print(f"nothing was learnt: {trained.summary['remark']}")
    config = trained.head.config
    if config.kind != "prefix":
        return
    from speccascade_t5x.evaluation import deferral_report

    report = deferral_report.evaluate(trained.test, trained.held_out, config.features.names, config.loss, trained.head)
    page = deferral_report.write(output_dir, report, "Learned deferral")
    for name, auc in report["auc"].items():
        gained = sum(each.value for each in report["curves"][name].against) / len(report["alphas"])
        error = report["gap_ece"][name]
        print(f"{name:<18} deferral AUC {auc:.3f}, ECE {error:.4f}, objective minus plug-in's {gained:+.5f}")
    print(f"wrote {page}")


@contextlib.contextmanager
def _observer(tensorboard: Path | None) -> Iterator[Live]:
    """Shows a live line on stderr, and writes TensorBoard files."""
    with progress.bar("{task.description}") as bar:
        yield Live(bar, tensorboard)


class Live(train_deferral.Observer):
    """A live line if stderr is a terminal, else plain lines; scalars for TensorBoard through clu."""

    def __init__(self, bar: Any, tensorboard: Path | None):
        self._bar, self._tensorboard, self._scalars = bar, tensorboard, progress.Scalars(self._say)
        self._row = bar.add_task("collecting", total=None)
        self._said: set[str] = set()

    def collecting(self, split: str, done: int, examples: int) -> None:
        self._bar.update(self._row, description=f"collecting {split}", total=examples, completed=done)
        if done == examples:
            self._say(f"collected {split}: {examples} examples")

    def calibrating(self, kind: str) -> None:
        self._say(f"calibrating: {kind}")

    def warned(self, text: str) -> None:
        self._say(f"note: {text}")

    def started(self, seed: int, step: int, steps: int) -> None:
        self._bar.update(self._row, description=f"fitting seed {seed}", total=steps, completed=step)
        if step:
            self._say(f"seed {seed} continues after step {step}")

    def looked(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._row, completed=step)
        if not self._bar.console.is_terminal:
            self._say(f"seed {seed} step {step}: " + "  ".join(f"{k} {v:.5f}" for k, v in metrics.items()))
        self._write(seed, step, metrics)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._bar.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, seed: int, step: int, metrics: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            self._scalars.write(self._tensorboard / f"seed-{seed}", step, metrics)


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade train_deferral"))
