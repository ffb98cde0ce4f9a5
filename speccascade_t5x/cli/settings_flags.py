"""Short flags for fields of `inference.generate.Settings`, the same in every verb that decodes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from typing import Any

from speccascade_t5x.common import checks


def draft_len(text: str) -> int | str:
    """A number, or "auto"."""
    return text if text == "auto" else int(text)


def k_matrix(text: str) -> tuple[tuple[int, ...], ...]:
    """ "5,14,10;0,1,10;0,0,10" as rows; brackets are taken as well."""
    bare = re.sub(r"\]\s*,\s*\[", ";", text.strip())
    return tuple(tuple(int(entry) for entry in row.strip("[] ").split(",")) for row in bare.strip("[] ").split(";"))


SETTINGS: dict[str, tuple[Any, str]] = {
    "method": (str, '"speculative" (default), or another of `speccascade methods`'),
    "rule": (str, "the cascade rule (default: lossless)"),
    "alpha": (float, "the rule's trade-off; `speccascade methods` explains its range"),
    "draft_len": (draft_len, 'number of tokens drafted per round; "auto" takes it from --plan'),
    "plan": (str, "the plan.json of `speccascade plan`, for --draft_len=auto"),
    "drafter": (str, '"model" (default), "max_gram", "prompt_lookup", "ngram" or "cascade"'),
    "k_matrix": (k_matrix, "K matrix of a cascade of drafters: rows separated by semicolons, such as 5,0;0,3"),
    "lenience": (float, "lenience L >= 1 between the drafters of a cascade (default: none, reviews are exact)"),
    "max_ngram": (int, "longest match that Max-Gram or prompt lookup uses, in tokens"),
    "min_ngram": (int, "shortest match that they use (default: 1)"),
    "ngram_fill": (str, '"argmax" (default) or "sample": how Max-Gram takes tokens from the n-gram table'),
    "verification": (str, 'verification of drafts: "token" (default) or "block"'),
    "draft_stop": (str, 'end drafts early by the drafter\'s "confidence" or "entropy"'),
    "stop_threshold": (float, "threshold of --draft_stop: a probability, or nats"),
    "confidence": (str, 'confidence of a sequence cascade: "mean" (default), "sum" or "quantile"'),
    "quantile": (float, "the quantile for --confidence=quantile"),
    "temperature": (float, "from 0 to 2 (default: 1); 0 is greedy"),
    "top_k": (int, "keep the k most likely tokens; 0 is off"),
    "top_p": (float, "keep the most likely tokens up to this mass; 1 is off"),
    "min_p": (float, "keep tokens of at least this share of the largest probability; 0 is off"),
    "max_input_len": (int, "maximum length of a prompt in tokens"),
    "max_len": (int, "maximum length of an output in tokens"),
    "num_samples": (int, "number of outputs per input"),
    "batch_size": (int, "number of inputs decoded together"),
    "seed": (int, "seed of the random key"),
}


def add_flags(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """Adds the flags, except those that a verb sets itself."""
    for name, (kind, text) in SETTINGS.items():
        if name not in leave_out:
            parser.add_argument(f"--{name}", type=kind, help=text)


def bindings(flags: argparse.Namespace) -> dict[str, Any]:
    """gin bindings of the flags; None where one was not given."""
    return {f"generate.Settings.{name}": getattr(flags, name, None) for name in SETTINGS}


def refuse_unsupported(argv: Sequence[str]) -> None:
    """Rejects options by name that no method here supports.

    Raises:
      UserError: a flag or binding asks for beam search, a penalty or the like.
    """
    for argument in argv:
        if argument.startswith("--"):
            checks.refuse_unsupported(argument[2:].partition("=")[0].removeprefix("gin.generate.Settings."))
