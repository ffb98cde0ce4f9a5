"""What a cascade of drafters gains over plain speculative decoding with the same neural drafter, in wall time.

    SPECCASCADE_L10N_DIR=corpus python benchmarks/cascades.py [--items 300] [--temperature 0 1] [--json cascades.json]

Restoring German (`restore_de`, validation split), batch 1, lossless, whole decodes: encoders, the loop and the copy of
the result to the host are all in the time. Every setting decodes every item in one run; on each item the settings
take turns, in an order that shifts from item to item, so that drift of the machine hits all alike. Compiling and one
warm-up decode per setting come before and are reported apart; temperature is a traced value, so both temperatures
run the same programs. Where --repeats is above 1 an item's time is its median.

    verifier             the verifier alone
    plain G              speculative decoding, the pair's drafter, G tokens a round
    max-gram             Max-Gram alone, no drafter model
    vertical             the drafter reviews what Max-Gram copies
    both                 and Max-Gram continues the draft after the drafter: vertical and horizontal cascade
    both, lenience 3     with the lossy acceptance between drafter and Max-Gram; the verifier's review stays exact
    both, bigram         a bigram table in Max-Gram's place

Printed per setting: tokens/s; the time of the verifier alone, and that of the best plain setting, over its own, each
per token, as the geometric mean over items with a paired t-interval; tokens per round; calls per token of each model;
and, apart from all these, the standardised walltime improvement in both published conventions. That is a count of
calls: by parameters a call costs the model's size, by step the measured time of one token, and neither knows of wide
blocks, copying or the machine. Then it says in words where a cascade loses.

The n-gram table is the bundle's (`speccascade tables`), else counted from the training split; the bigram setting
always counts its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads; name another platform to measure it

import machine
import numpy as np

from speccascade_t5x.core import accounting
from speccascade_t5x.data import batching
from speccascade_t5x.drafting import NGramTable, build_table
from speccascade_t5x.evaluation.statistics import Estimate, TimeRatios
from speccascade_t5x.inference import generate, measuring
from speccascade_t5x.inference.generate import LoadedPair
from speccascade_t5x.inference.settings import make_settings
from speccascade_t5x.tasks import l10n
from speccascade_t5x.tasks.folding import fold

# Longer than any output: nothing matches, so all is filled from the table. The search finds that out in one pass.
TABLE_ALONE = {"max_ngram": 10_000, "min_ngram": 10_000}


def settings_of(plain: Sequence[int], vertical: str, both: str) -> dict[str, dict[str, Any]]:
    """Name -> options; "bigram" is no option but says which table drafts."""
    down, across = ({"drafter": "cascade", "k_matrix": matrix(text)} for text in (vertical, both))
    return {
        "verifier": {"method": "verifier"},
        **{f"plain {length}": {"draft_len": length} for length in plain},
        "max-gram": {"drafter": "max_gram", "draft_len": max(plain)},
        "vertical": down,
        "both": across,
        "both, lenience 3": across | {"lenience": 3.0},
        "both, bigram": across | TABLE_ALONE | {"bigram": True},
    }


def matrix(text: str) -> tuple[tuple[int, ...], ...]:
    """ "8,4;0,5" as a K matrix."""
    return tuple(tuple(int(entry) for entry in row.split(",")) for row in text.split(";"))


def texts(split: str, longest: int) -> list[str]:
    """The German texts of the task, as long as its pair was trained on."""
    rows = l10n.read_rows(l10n.corpus_dir() / f"{split}.tsv.gz")
    return [row.de for row in rows if len(row.de.encode()) < longest]


def counted(pair: LoadedPair, order: int, successors: int = 16) -> NGramTable:
    """An n-gram table of the training split."""
    pieces = pair.vocabulary
    sequences = ([*pieces.encode(text), pieces.eos_id] for text in texts("train", pair.feature_lengths["inputs"]))
    return build_table(sequences, pair.verifier.model.vocab_size, order=order, successors=successors)


@dataclasses.dataclass
class Arm:
    """One setting: how it decodes, and what its decodes of each item gave.

    Attributes:
      runner: the pair under the setting.
      prepare_s: compiling and the warm-up decode.
      seconds: [items] lists of wall times.
      counts: [items] counters.
      tokens: [items] output tokens.
    """

    runner: generate.Runner
    prepare_s: float = 0.0
    seconds: list[list[float]] = dataclasses.field(default_factory=list)
    counts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tokens: list[list[int]] = dataclasses.field(default_factory=list)

    def decode(self, batch: batching.Batch) -> tuple[float, dict[str, Any]]:
        """(wall time of one decode, its record)."""
        begin = time.perf_counter()
        (record,) = self.runner.decode(batch).values()
        return time.perf_counter() - begin, record

    @property
    def time(self) -> np.ndarray:
        """[items] median seconds."""
        return np.asarray([np.median(each) for each in self.seconds])

    @property
    def length(self) -> np.ndarray:
        """[items] tokens."""
        return np.asarray([len(each) for each in self.tokens], float)


def measure(
    pairs: dict[bool, LoadedPair],
    chosen: dict[str, dict[str, Any]],
    prompts: Sequence[str],
    temperature: float,
    how: argparse.Namespace,
) -> dict[str, Arm]:
    """Decodes every item with every setting, all taking turns. `pairs` has the bigram's under True."""
    arms: dict[str, Arm] = {}
    for name, settings in chosen.items():
        settings = dict(settings)
        pair = pairs[settings.pop("bigram", False)]
        common = {"temperature": temperature, "batch_size": 1, "seed": how.seed, "truncate": True}
        # One shape for all items, so that a setting is compiled once.
        buckets = (pair.feature_lengths["inputs"],)
        arms[name] = Arm(generate.Runner(pair, make_settings(**common, buckets=buckets, **settings)))
    any_arm = next(iter(arms.values())).runner
    batches = any_arm.batches([any_arm.prompt_form.encode(i, text, f"item {i}") for i, text in enumerate(prompts)])
    for name, arm in arms.items():
        begin = time.perf_counter()
        arm.decode(batches[0])
        arm.prepare_s = time.perf_counter() - begin
        print(f"  prepared {name} in {arm.prepare_s:.1f} s", flush=True)
    names = list(arms)
    for repeat in range(how.repeats):
        for item, batch in enumerate(batches):
            first = (item + repeat) % len(names)
            for name in names[first:] + names[:first]:
                arm = arms[name]
                seconds, record = arm.decode(batch)
                if repeat == 0:
                    arm.seconds.append([])
                    arm.counts.append(record["counts"])
                    arm.tokens.append(record["tokens"])
                arm.seconds[item].append(seconds)
    return arms


def figures(arms: dict[str, Arm], costs: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Every setting's figures; ratios are paired per item."""
    times = TimeRatios(len(arms["verifier"].tokens))
    per_token = {name: arm.time / arm.length for name, arm in arms.items()}
    best = min((name for name in arms if name.startswith("plain")), key=lambda name: np.log(per_token[name]).mean())
    found = {}
    for name, arm in arms.items():
        total = accounting.total(arm.counts)
        rates = accounting.rates(total)
        calls = rates.get("level_calls_per_token", [rates["drafter_calls_per_token"]])
        row: dict[str, Any] = {
            "tokens_per_s": float(arm.length.sum() / arm.time.sum()),
            "over_verifier": times.ratio(per_token["verifier"], per_token[name]),
            "over_plain": times.ratio(per_token[best], per_token[name]),
            "tokens_per_round": rates["block_efficiency"],
            "calls_per_token": [rates["verifier_calls_per_token"], *calls],
            "same_output": float(np.mean([a == b for a, b in zip(arm.tokens, arms["verifier"].tokens, strict=True)])),
            "best_plain": name == best,
            "prepare_s": arm.prepare_s,
        }
        # A copying drafter has no model, and the verifier alone no drafter: the convention counts what was called.
        charged = {key: each[: len(calls)] for key, each in costs.items()}
        row["standardised"] = {key: accounting.standardised_improvement(total, each) for key, each in charged.items()}
        found[name] = row
    return found


def shown(estimate: Estimate) -> str:
    ends = "" if np.isnan(estimate.low) else f" ({estimate.low:.2f} to {estimate.high:.2f})"
    return f"{estimate.value:.2f}{ends}"


def report(rows: dict[str, dict[str, Any]], temperature: float, items: int, repeats: int) -> str:
    """Markdown: wall time, then the count of calls, then words."""
    best = next(name for name, row in rows.items() if row["best_plain"])
    lines = [
        f"### Temperature {temperature:g}, {items} items, {repeats} repeat(s)",
        "",
        f"Wall time (ratios per token, above 1 is faster; 95 % t-intervals over the {items} items):",
        "",
        f"| setting | tokens/s | over the verifier alone | over {best} | tokens per round | calls per token |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        calls = ", ".join(f"{each:.2f}" for each in row["calls_per_token"])
        lines.append(
            f"| {name} | {row['tokens_per_s']:.0f} | {shown(row['over_verifier'])} | {shown(row['over_plain'])} | "
            f"{row['tokens_per_round']:.2f} | {calls} |"
        )
    lines += [
        "",
        "Calls per token: the verifier's, then each drafter model's. NOT wall time: the standardised walltime",
        "improvement, a count of calls in the two published conventions:",
        "",
        "| setting | by parameters | by step | wall time beside it |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        by = row["standardised"]
        wall = row["over_verifier"].value
        lines.append(f"| {name} | {by['by_parameters']:.2f} | {by['by_step']:.2f} | {wall:.2f} |")
    return "\n".join([*lines, "", *words(rows, best, temperature), ""])


def words(rows: dict[str, dict[str, Any]], best: str, temperature: float) -> list[str]:
    """Where a drafter that copies gains and where it loses, sentence by sentence."""
    found = []
    for name, row in rows.items():
        if name == "verifier" or name.startswith("plain"):
            continue
        ratio: Estimate = row["over_plain"]
        verdict = "is level with"
        if ratio.above(1.0):
            verdict = f"gains {100 * (ratio.value - 1):.0f} % over"
        elif ratio.below(1.0):
            verdict = f"loses {100 * (1 - ratio.value):.0f} % against"
        promised = row["standardised"]["by_step"] / rows[best]["standardised"]["by_step"]
        sentence = f"- {name} {verdict} {best} ({shown(ratio)}); by the count of steps it would be {promised:.2f}."
        if row["over_verifier"].below(1.0):
            sentence += " It is slower than the verifier alone."
        found.append(sentence)
    losing = [name for name, row in rows.items() if row["over_plain"].below(1.0) and name != "verifier"]
    if temperature == 0.0:
        apart = {name: row["same_output"] for name, row in rows.items() if row["same_output"] < 1.0}
        what = ", ".join(f"{name} {100 * same:.1f} %" for name, same in apart.items())
        found.append(f"- Outputs equal to the verifier's own: {what or 'all, in every setting'}.")
    found.append(f"- Surely slower than {best}: {', '.join(losing) or 'none'}.")
    return found


def as_json(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        name: {key: value.as_dict() if isinstance(value, Estimate) else value for key, value in row.items()}
        for name, row in rows.items()
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--items", type=int, default=300, help="validation items, spread evenly over the split")
    made.add_argument("--repeats", type=int, default=3, help="decodes of each item by each setting")
    made.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    made.add_argument("--bundle", default="restore_de_pair", help="a bundle's folder, or the name of a packaged one")
    made.add_argument("--plain", type=int, nargs="+", default=[5, 8, 12], help="draft lengths of the plain settings")
    made.add_argument("--vertical", default="8,0;0,5", help="K matrix of the vertical cascade")
    made.add_argument("--both", default="8,4;0,5", help="K matrix of the vertical and horizontal one")
    made.add_argument("--only", nargs="+", help="only these settings, beside the verifier and the first plain one")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="also write the figures as JSON")
    return made


def main() -> None:
    """Measures, prints, and writes JSON where asked."""
    how = parser().parse_args()
    found: dict[str, Any] = {"machine": machine.name(), "load_before": machine.load_average()}
    print(f"{found['machine']}; load average {found['load_before']:.2f}\n")
    pair, bigram = generate.load(how.bundle), generate.load(how.bundle)
    if pair.table is None:
        pair.table = counted(pair, order=3)
    bigram.table = counted(bigram, order=2)
    every = texts("validation", pair.feature_lengths["inputs"])
    places = np.linspace(0, len(every) - 1, min(how.items, len(every))).round().astype(int)
    prompts = [fold(every[i]) for i in places]
    chosen = settings_of(how.plain, how.vertical, how.both)
    if how.only:
        kept = {"verifier", f"plain {how.plain[0]}", *how.only}
        chosen = {name: options for name, options in chosen.items() if name in kept}
    costs = measuring.published_costs(pair.verifier, [pair.drafter])
    print(f"A call of the drafter in calls of the verifier: by parameters {costs['by_parameters'][0]:.3f}, by step "
          f"{costs['by_step'][0]:.3f}\n")  # fmt: skip
    found |= {"costs": costs, "items": len(prompts), "repeats": how.repeats, "temperatures": {}}
    for temperature in how.temperature:
        begin = time.perf_counter()
        rows = figures(measure({False: pair, True: bigram}, chosen, prompts, temperature, how), costs)
        print("\n" + report(rows, temperature, len(prompts), how.repeats))
        print(f"({time.perf_counter() - begin:.0f} s in all)\n", flush=True)
        found["temperatures"][f"{temperature:g}"] = as_json(rows)
    found["load_after"] = machine.load_average()
    print(f"load average {found['load_after']:.2f}, peak resident memory {machine.peak_memory() / 1e6:.0f} MB")
    if how.json:
        how.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
