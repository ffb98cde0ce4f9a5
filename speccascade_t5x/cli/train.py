"""`speccascade train`: trains or distils a model on tokenised shards or a seqio task.

    speccascade train --model=restore_de_drafter --cached=shards/train --output_dir=run --steps=2000
    speccascade train --gin_file=runs/train_restore_de_verifier.gin --gin.OUTPUT_DIR="'run'"

Short flags are bindings; the config.gin beside the checkpoints holds the resolved configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speccascade_t5x.cli import gin_flags, host_processes, preemption, progress, topology
from speccascade_t5x.common import paths
from speccascade_t5x.inference import records
from speccascade_t5x.training import train_loop

# Short flag -> (type, help). These are macros of runs/train.gin.
_MACROS = {
    "output_dir": (str, "folder for checkpoints, curves and config.gin; a run found there is continued"),
    "steps": (int, "total number of updates (default: 10000)"),
    "cached": (str, "folder of tokenised shards to train on"),
    "task": (str, "a registered seqio task, instead of --cached"),
    "eval_cached": (str, "folder of tokenised shards to evaluate on"),
    "start_from": (str, "checkpoint or bundle with the initial parameters"),
    "teacher": (str, "checkpoint or bundle to compare with, and to distil from if a distillation loss is configured"),
    "inputs_len": (int, "number of encoder positions of a row"),
    "targets_len": (int, "number of decoder positions of a row"),
    "batch_size": (int, "number of rows of a batch"),
    "eval_every": (int, "number of steps between evaluations (0: only before and after training)"),
    "checkpoint_every": (int, "number of steps between checkpoints"),
    "log_every": (int, "number of steps between progress reports"),
    "seed": (int, "seed of the initialisation, of dropout and of the order of the data"),
}

_EPILOG = """\
required:
  --output_dir, --cached or --task, and --model or a gin file that binds t5.T5Config

bindings (each flag above sets one of them; any other is set with --gin.NAME=VALUE):
  OUTPUT_DIR, STEPS, CACHED, TASK, EVAL_CACHED, START_FROM, TEACHER, INPUTS_LEN, TARGETS_LEN, BATCH_SIZE,
    EVAL_EVERY, CHECKPOINT_EVERY, LOG_EVERY, SEED, OPTIMIZER
  t5.T5Config.dropout_rate, dtype
  train.Data.batching, tokens_per_batch, buckets, split, eval_split, eval_limit
  train_loop.TrainConfig.microbatches, keep, distill
  losses.LossConfig.z_loss, label_smoothing, normalizer
  losses.DistillConfig.divergence, weight, temperature
  optimizers.Schedule.name, base, warmup_steps, total_steps, final_share
  the fields of optimizers.Adafactor and optimizers.AdamW
  train.train.devices                number of devices that share a batch (default: all)
  partitioning.Topology.devices, data, model, submesh, rules, strict    the mesh of --topology

gin files:
  --task=NAME reads runs/train_NAME.gin if that file is packaged, else runs/train.gin.
  --model=NAME reads models/NAME.gin after it.

The config.gin beside the checkpoints repeats the run: speccascade train --gin_file=FOLDER/config.gin
The same command continues a killed run; on one device in float32 the result is bit-identical. A run that receives
SIGTERM writes a checkpoint and exits with code 75.
"""


def main(argv: list[str]) -> int:
    """Parses flags and runs the job. Returns the exit code."""
    flags, bindings = gin_flags.split(_parser(), argv)
    host_processes.join(flags, "speccascade train")
    files = flags.gin_file or [gin_flags.default_file("train", flags.task)]
    if flags.model:
        files = [*files, f"models/{flags.model}.gin"]
    mesh_files, mesh_bindings = topology.configured(flags.topology)
    files = [*files, *mesh_files]
    shorts = {name.upper(): getattr(flags, name) for name in _MACROS} | mesh_bindings
    config_text = gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    from speccascade_t5x.distributed.hosts import Preempted
    from speccascade_t5x.training import train

    known = ", ".join(sorted(file.stem for file in (paths.gin_configs_dir() / "models").glob("*.gin")))
    needed = {
        "train.train.data": "begin with a run file, such as --gin_file=runs/train.gin",
        "t5.T5Config.vocab_size": f"name an architecture with --model, one of {known}",
    }
    job = gin_flags.job(train.train, needed)
    try:
        with preemption.stop_on_sigterm() as stop, _observer(not flags.no_tensorboard) as observer:
            summary = job(config_text=config_text, observer=observer, stop=stop)
    except Preempted as preempted:
        sentence = str(preempted).splitlines()[0]  # gin appends where it came from
        print(f"speccascade train: {sentence}", file=sys.stderr)
        return preemption.EXIT_CODE
    if not host_processes.first():
        return 0
    for name, value in summary.items():
        if not isinstance(value, dict):
            print(f"{name:<26} {records.shown(value) if isinstance(value, float) else value}")
    for name, value in summary["after"].items():
        before = summary["before"].get(name, value)
        print(f"{name:<26} {records.shown(before)} -> {records.shown(value)}")
    print(f"wrote {observer.output_dir / 'train-summary.md'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    usage = ["--model=NAME --cached=FOLDER --output_dir=FOLDER --steps=N [flags]"]
    description = "Trains or distils a model on tokenised shards or a seqio task."
    parser = gin_flags.parser("train", usage, description, _EPILOG, _MACROS)
    parser.add_argument("--model", help="name of a packaged file of models/, such as restore_de_drafter")
    parser.add_argument("--topology", help=topology.HELP)
    parser.add_argument("--no_tensorboard", action="store_true", help="write no TensorBoard files")
    host_processes.add_flags(parser)
    gin_flags.add_flags(parser)
    return parser


@contextlib.contextmanager
def _observer(tensorboard: bool) -> Iterator[Live]:
    """Shows a live line on stderr, and writes TensorBoard files beside the checkpoints."""
    with progress.bar(
        "training", "loss {task.fields[loss]}  {task.fields[speed]} tokens/s{task.fields[evaluation]}"
    ) as bar:
        yield Live(bar, tensorboard)


class Live(train_loop.Observer):
    """A live line if stderr is a terminal, else plain lines; scalars for TensorBoard through clu."""

    def __init__(self, bar: Any, tensorboard: bool):
        self._bar, self._scalars = bar, progress.Scalars(self._say) if tensorboard else None
        self.output_dir = Path()
        self._row = bar.add_task("", total=None, loss="-", speed="-", evaluation="")
        self._begun = (time.monotonic(), 0)
        self._steps = 0

    def started(self, step: int, steps: int, output_dir: Path | None) -> None:
        self.output_dir = output_dir or Path()
        self._steps, self._begun = steps, (time.monotonic(), step)
        self._bar.update(self._row, total=steps, completed=step)
        if step:
            self._say(f"continues after step {step}")

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        loss, speed = f"{metrics['cross_entropy']:.4f}", f"{metrics['tokens_per_s']:,.0f}"
        self._bar.update(self._row, completed=step, loss=loss, speed=speed)
        if not self._bar.console.is_terminal:
            begun, first = self._begun
            left = (time.monotonic() - begun) / max(step - first, 1) * (self._steps - step)
            self._say(f"step {step}/{self._steps}  loss {loss}  {speed} tokens/s  {left / 60:.1f} min left")
        self._write("train", step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self._bar.update(self._row, evaluation=f"  nll {metrics['nll']:.4f}")
        self._say(f"after step {step}: {figures}")
        self._write("eval", step, metrics)

    def _say(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, soft_wrap=True)

    def _write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._scalars is not None:
            self._scalars.write(self.output_dir / "tensorboard" / kind, step, metrics)


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade train"))
