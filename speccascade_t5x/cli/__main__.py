"""`speccascade VERB ...`: finds the verb and turns a user's mistake into one sentence and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from speccascade_t5x.cli import accelerators, host_processes, terminal
from speccascade_t5x.common import checks
from speccascade_t5x.interfaces import UserError

# Group -> verb -> what it does, in the order `speccascade --help` lists them.
GROUPS = {
    "Decode": {
        "demo": "decode a few sentences with the packaged pair under several methods",
        "infer": "decode a seqio task, or lines of text, with a pair",
        "methods": "list every execution, rule and drafter, with what alpha means and its source",
    },
    "Train": {
        "cache": "write a seqio task, or a model's outputs, as tokenised shards to train on",
        "train": "train or distil a model on tokenised shards or a seqio task",
        "train_deferral": "fit heads and calibrations for the rules of learned deferral",
        "tables": "count a task or tokenised shards into an n-gram table and store it in a bundle",
    },
    "Measure": {
        "plan": "predict which draft length, drafter and K matrix pay off, from measured acceptance and step costs",
        "sweep": "measure methods at several alphas on a task: frontier, operating points, report",
    },
    "Checkpoints": {
        "inspect": "describe a checkpoint of any kind",
        "export": "write a checkpoint as a bundle, plain Orbax, native T5X or Hugging Face folder",
        "prune": "cut the vocabulary of a T5 down to the pieces that a task uses most",
    },
    "TPU": {
        "precompile": "compile a pair for TPU slices without a TPU: memory, collectives, cost, and what does not fit",
        "slice_plan": "predict tokens per second of a pair on a TPU slice, and when speculation stops paying off there",
    },
}
VERBS = {verb: purpose for verbs in GROUPS.values() for verb, purpose in verbs.items()}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: speccascade VERB [flags]        (speccascade VERB --help lists them)")
        for group, verbs in GROUPS.items():
            print(f"\n{group}:")
            for verb, purpose in verbs.items():
                print(f"  {verb:<14} {purpose}")
        return 0 if argv else 2
    verb = argv[0]
    if verb not in VERBS:
        print(f"speccascade: there is no verb {verb!r}: {checks.suggestion(verb, VERBS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"speccascade_t5x.cli.{verb}")
    return run_verb(module.main, argv[1:], f"speccascade {verb}")


def run_verb(verb: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    """Calls a verb's main. A UserError becomes one message on stderr and exit code 2, without a traceback."""
    return host_processes.leave(_run(verb, argv, name))


def _run(verb: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    # Native libraries log while they load; the verbs report what matters of it themselves.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    accelerators.settle()
    terminal.guard()
    try:
        code = verb(argv)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except Exception as error:
        code = host_processes.failed(error, name)
        if code is not None:
            return code
        if isinstance(error, BrokenPipeError):  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if not isinstance(error, UserError):
            raise
        # gin appends where in the configuration a call came from; that is for developers.
        message = str(error).partition("\n  In call to configurable")[0]
        print(f"{name}: {terminal.line(message)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
