"""`speccascade export`: writes a checkpoint of any kind as a bundle, plain Orbax, native T5X or Hugging Face.

    speccascade export --source=flan-t5-small --target=small/checkpoint_0 --format=t5x --verify
    speccascade export --source=large/checkpoint_1000 --drafter=small/checkpoint_1000 \\
        --vocabulary=sentencepiece.model --target=pair --format=bundle --max_file_mb=15

Short flags are bindings: see runs/export.gin.
"""

from __future__ import annotations

import sys
from typing import Any

from speccascade_t5x.cli import gin_flags

# Short flag -> (type, help). These are macros of runs/export.gin.
_MACROS = {
    "source": (str, "a checkpoint of any kind, see `speccascade inspect`; a folder or a gs:// address"),
    "target": (str, "the folder to create, or a gs:// address; T5X expects the name checkpoint_<step>"),
    "format": (str, "bundle, orbax, t5x, huggingface, or t5x_pair (both models in one T5X checkpoint)"),
}
# Short flags that are arguments of checkpoints.export.export.
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "dtype": (str, "dtype of the written parameters: float32 (default), bfloat16 or float16"),
    "step": (int, "number of training steps to record (default: the source's)"),
    "max_file_mb": (float, "maximum size of a file, in MB of 10^6 bytes"),
    "max_shard_mb": (float, "maximum size of a safetensors file, in MB (default: 5000)"),
    "kind": (str, gin_flags.KIND),
    "allow_drivers": (gin_flags.names, gin_flags.ALLOW_DRIVERS),
    "drafter": (str, "checkpoint of the drafter, for a bundle or t5x_pair; --source is then the verifier"),
    "vocabulary": (str, 'vocabulary of a bundle: "bytes" or a SentencePiece model'),
    "extra_ids": (int, "number of sentinels after its ordinary pieces (default: 125 for bytes, 100 otherwise)"),
    "max_input_len": (int, "maximum length of inputs of a bundle, in tokens (default: 256)"),
    "max_len": (int, "maximum length of outputs of a bundle, in tokens (default: 128)"),
    "description": (str, "human-readable description of a bundle"),
}
_SWITCHES = {
    "optimizer_state": "keep the optimizer state (from T5X or Orbax to t5x or orbax)",
    "verify": "read the result back, compare parameters and logits, and keep it only if they are right",
    "overwrite": "replace an existing checkpoint",
}

_EPILOG = """\
required:
  --source, --target and --format

bindings (each flag above sets one of them):
  SOURCE, TARGET, FORMAT
  export.export.dtype, optimizer_state, step, max_file_mb, max_shard_mb, verify, overwrite, allow_drivers, drafter,
    vocabulary, extra_ids, max_input_len, max_len, description, kind
"""


def main(argv: list[str]) -> int:
    """Parses flags, exports, prints what was written. Returns the exit code."""
    usage = ["--source=PATH --target=PATH --format=FORMAT [flags]"]
    description = "Writes a checkpoint in another format. The target is written atomically: whole or not at all."
    parser = gin_flags.parser("export", usage, description, _EPILOG, _MACROS | _ARGUMENTS)
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    gin_flags.add_flags(parser)
    flags, bindings = gin_flags.split(parser, argv)
    shorts = {name.upper(): getattr(flags, name) for name in _MACROS}
    shorts |= {f"export.export.{name}": getattr(flags, name) for name in _ARGUMENTS}
    shorts |= {f"export.export.{name}": getattr(flags, name) or None for name in _SWITCHES}
    files = flags.gin_file or ["runs/export.gin"]
    gin_flags.load(files, bindings + gin_flags.literal(shorts), flags.gin_search_paths)

    import gin

    from speccascade_t5x.checkpoints import export

    report = gin.get_configurable(export.export)()
    size, name = report.largest
    print(f"{'format':<12}{report.format}" + ("" if report.step is None else f", step {report.step:,}"))
    print(f"{'parameters':<12}{report.parameters:,}")
    if report.optimizer_tensors:
        print(f"{'optimizer':<12}{report.optimizer_tensors} tensors")
    print(
        f"{'files':<12}{report.files}, {report.bytes / 1e6:,.2f} MB in all, the largest {size / 1e6:,.2f} MB ({name})"
    )
    if report.drift is not None:
        print(f"{'verified':<12}parameters read back as written; logits within {report.drift:.3g} of the source's")
    print(f"wrote {report.target}")
    return 0


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade export"))
