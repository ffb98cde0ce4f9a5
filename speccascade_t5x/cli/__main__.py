"""`speccascade VERB ...`: finds the verb and turns a user's mistake into one sentence and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from speccascade_t5x.cli import streams

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
    """Runs a verb. Returns the exit code; without `argv`, as the console script calls it, the process ends with it."""
    if argv is None:
        streams.end(main(sys.argv[1:]))
    if not argv or argv[0] in ("-h", "--help"):
        return _run(_usage, argv, "speccascade")
    name = f"speccascade {argv[0]}" if argv[0] in VERBS else "speccascade"
    return run_verb(lambda flags: _verb(argv[0])(flags), argv[1:], name)


def _usage(argv: list[str]) -> int:
    print("usage: speccascade VERB [flags]        (speccascade VERB --help lists them)")
    for group, verbs in GROUPS.items():
        print(f"\n{group}:")
        for verb, purpose in verbs.items():
            print(f"  {verb:<14} {purpose}")
    return 0 if argv else 2


def _verb(verb: str) -> Callable[[list[str]], int]:
    """What runs a verb."""
    if verb not in VERBS:
        from speccascade_t5x.common import checks
        from speccascade_t5x.interfaces import UserError

        raise UserError(f"there is no verb {verb!r}: {checks.suggestion(verb, VERBS)}")
    return importlib.import_module(f"speccascade_t5x.cli.{verb}").main


def run_verb(verb: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    """Calls a verb's main. A UserError becomes one message on stderr and exit code 2, without a traceback."""
    code = _run(verb, argv, name)
    host_processes = sys.modules.get("speccascade_t5x.cli.host_processes")
    return host_processes.leave(code) if host_processes else code


def _run(verb: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    # Native libraries log while they load; the verbs report what matters of it themselves.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    streams.settle()
    try:
        return _called(verb, argv, name)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130


def _called(verb: Callable[[list[str]], int], argv: list[str], name: str) -> int:
    from speccascade_t5x.cli import accelerators, host_processes, terminal  # loads JAX, which an interrupt may end

    accelerators.settle()
    terminal.guard()
    try:
        code = verb(argv)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except SystemExit as end:  # of argparse, after --help
        failed = streams.failure()
        if end.code or failed is None:
            raise
        print(f"{name}: {_unwritten(failed)}", file=sys.stderr)
        return 2
    except Exception as error:
        handled = host_processes.failed(error, name)
        if handled is not None:
            return handled
        if isinstance(error, BrokenPipeError):  # the reader of our output has left
            streams.silence()
            return 141
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"{name}: {terminal.line(sentence)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str | None:
    """What a user is told of an error; None for a mistake of ours, which keeps its traceback.

    Raises:
      KeyboardInterrupt: a library has turned one into something else.
    """
    from speccascade_t5x.interfaces import UserError

    if isinstance(error, UserError):
        # gin appends where in the configuration a call came from; that is for developers.
        return str(error).partition("\n  In call to configurable")[0]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "there is not enough memory for this: use a smaller batch, shorter lengths or fewer samples"
    if isinstance(error, OSError):
        if (failed := streams.failure(error)) is not None:
            return _unwritten(failed)
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    return None


def _unwritten(error: OSError) -> str:
    return f"standard output cannot be written ({error.strerror})"


if __name__ == "__main__":
    main()
