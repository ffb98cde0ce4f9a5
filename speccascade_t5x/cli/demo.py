"""`speccascade demo`: the methods side by side on the packaged pair, without network or data.

The pair restores capitals, umlauts, sharp s and accents of German text from its lower-case
ASCII-folded form. Sentences written for this package, and those given with `--text`, are decoded by
each model alone and by both together under three rules; one table compares quality and speed, and a
coloured trace shows who wrote what. It takes about a minute on two CPU cores. The flags or the gin
file of any other method of `speccascade methods` add it to the table:

    speccascade demo --rule=opt --alpha=0.1 --verification=block
    speccascade demo --gin_file=rules/lossy_sd.gin
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

import speccascade_t5x
from speccascade_t5x.cli import demo_report as report
from speccascade_t5x.cli import gin_flags, settings_flags, terminal
from speccascade_t5x.cli.demo_result import DemoOptions, DemoResult, Example, MethodResult
from speccascade_t5x.common import paths
from speccascade_t5x.core import accounting, rules
from speccascade_t5x.inference.generate import Generation, LoadedPair, Runner, Settings
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks import metrics
from speccascade_t5x.tasks.folding import fold

SENTENCES = "demo_de.tsv"
PAIR = "restore_de_pair"
# Fields of Settings that define the method: the rows of the table differ in these alone.
_CHOICE = (
    *("method", "rule", "alpha", "rule_options", "verification"),
    *("draft_stop", "stop_threshold", "confidence", "quantile"),
    *("drafter", "k_matrix", "lenience", "edge_rules", "max_ngram", "min_ngram", "ngram_fill"),
)
_FIXED = ("max_input_len", "num_samples", "batch_size")


def main(argv: list[str]) -> int:
    """Runs the verb. Raises UserError where the flags or the bundle are wrong."""
    options, width = parse(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal whose encoding has no umlauts shows '?', and the run does not fail.
        sys.stdout.reconfigure(errors="replace")
    console = terminal.console(width=width)
    log = terminal.console(stderr=True)
    if not log.is_terminal:
        run_demo(options, console)
        return 0
    # Seldom refreshed: the spinner runs beside what is being measured.
    with log.status("loading", refresh_per_second=2) as status:
        run_demo(options, console, lambda what: status.update(what) if what else status.stop())
    return 0


def parse(argv: Sequence[str]) -> tuple[DemoOptions, int | None]:
    """Flags to (options, console width).

    Raises:
      UserError: an unknown flag or binding, or a value outside its range.
    """
    settings_flags.refuse_unsupported(argv)
    flags, bindings = gin_flags.split(_parser(), argv)
    if flags.width is not None and flags.width < 20:
        raise UserError(f"--width={flags.width} is too narrow: it must be 20 or more")
    options = DemoOptions(
        bundle=flags.bundle,
        texts=tuple(flags.text),
        sentences=flags.sentences,
        alphas=DemoOptions.alphas if flags.alphas is None else _alphas(flags.alphas),
        repeats=flags.repeats,
        settings=_settings(flags, bindings),
    )
    return options, flags.width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="speccascade demo",
        description=__doc__.partition("\n\n")[2],
        epilog="Colours follow the terminal; NO_COLOR=1 turns them off, FORCE_COLOR=1 on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--text", action="append", default=[], metavar="TEXT", help="German text, plain or folded; may be repeated")
    add("--sentences", type=int, metavar="N", help="use only the first N packaged sentences; 0 uses none")
    add("--alphas", nargs="+", metavar="ALPHA", help="two alphas for TokenV3 and MinP, 0 to 1 (default: 0.3 0.9)")
    add("--repeats", type=int, default=DemoOptions.repeats, help="number of measured rounds (default: %(default)s)")
    add("--bundle", type=Path, default=paths.pretrained_dir() / PAIR, help="folder of another pair for restore_de")
    add("--width", type=int, metavar="COLUMNS", help="width of the output in columns (default: the terminal's)")
    settings_flags.add_flags(parser, leave_out=_FIXED)
    gin_flags.add_flags(parser)
    return parser


def _settings(flags: argparse.Namespace, bindings: Sequence[str]) -> Settings:
    """Settings from gin files, bindings and short flags, applied in this order."""
    import gin

    shorts = gin_flags.literal(settings_flags.bindings(flags))
    gin_flags.load(["runs/demo.gin", *flags.gin_file], [*bindings, *shorts], flags.gin_search_paths)
    return gin.get_configurable(Settings)()


def _alphas(given: Sequence[str]) -> tuple[float, float]:
    """`--alphas 0.3 0.9` or `--alphas=0.3,0.9`."""
    words = [word for item in given for word in item.split(",") if word]
    low = max(rules.get(name).alpha_range[0] for name in report.COMPARED)
    high = min(rules.get(name).alpha_range[1] for name in report.COMPARED)
    try:
        values = tuple(float(word) for word in words)
    except ValueError:
        values = ()
    in_range = all(low <= value <= high for value in values)
    if len(values) != 2 or not in_range or values[0] == values[1]:
        raise UserError(
            f"--alphas {' '.join(given)}: give two different numbers from {low:g} to {high:g}, such as --alphas 0.3 0.9"
        )
    return values


def run_demo(options: DemoOptions, console: Console, progress: Callable[[str], None] = lambda _: None) -> DemoResult:
    """Decodes, measures and prints.

    Args:
      options: what to do.
      console: where the output goes.
      progress: called with a short description of the current step, and with '' before the first line is printed.

    Raises:
      UserError: no bundle or one without a drafter, nothing to decode, a text or option out of range.
    """
    begin = time.perf_counter()
    pair = speccascade_t5x.load(options.bundle)
    examples = _examples(options, pair)
    result = _measure(pair, examples, _methods(options, pair), options, progress)
    progress("")
    report.show(result, pair.vocabulary, console)
    console.print(
        f"\nTime: {time.perf_counter() - begin:.0f} s in all; {result.compile_s:.1f} s of it compiling, "
        f"once per method and in no figure above, and {result.decode_s:.1f} s decoding."
    )
    report.show_end(console)
    return result


def packaged_sentences() -> list[str]:
    """The German sentences that travel with the package."""
    lines = (paths.pretrained_dir() / SENTENCES).read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[1] for line in lines if not line.startswith("#")]


def _examples(options: DemoOptions, pair: LoadedPair) -> tuple[Example, ...]:
    """Given texts first, so that they are the ones shown."""
    if options.sentences is not None and options.sentences < 0:
        raise UserError(f"--sentences={options.sentences} is too small: it must be 0 or more")
    limit = pair.feature_lengths["inputs"]
    examples = []
    for text in options.texts:
        try:
            length = len(pair.vocabulary.encode(fold(text))) + 1
        except UnicodeEncodeError:
            raise UserError(f"--text {text!r} is not valid Unicode text: check the terminal's encoding") from None
        if not text.strip() or not text.isprintable():
            raise UserError(f"--text {text!r} must be one line with at least one letter")
        if length > limit:
            raise UserError(
                f"--text {text!r} has {length} tokens when folded, end of text included, but the "
                f"pair reads {limit}: shorten it or give its parts one by one"
            )
        examples.append(Example(fold(text), text if text != fold(text) else None))
    examples += [Example(fold(text), text) for text in packaged_sentences()[: options.sentences]]
    if not examples:
        raise UserError('there is nothing to decode: give --text "..." or --sentences 1 or more')
    return tuple(examples)


def _methods(options: DemoOptions, pair: LoadedPair) -> dict[str, Settings]:
    """Label to settings, in the order of the table."""
    settings = options.settings
    if options.repeats < 1:
        raise UserError(f"--repeats={options.repeats} is too small: it must be 1 or more")
    if settings.draft_len == 0:
        raise UserError("--draft_len=0 is too small: it must be 1 or more")
    if pair.drafter is None:
        raise UserError(f"the bundle {options.bundle} holds a verifier alone, but the demo needs a pair")
    one_length = (pair.feature_lengths["inputs"],)  # one compile per method
    chosen = dataclasses.replace(settings, batch_size=1, num_samples=1, trace=False, buckets=one_length)
    defaults = {name: getattr(Settings(), name) for name in _CHOICE}
    common = dataclasses.replace(chosen, **defaults)
    found = {
        report.VERIFIER: dataclasses.replace(common, method="verifier"),
        report.DRAFTER: dataclasses.replace(common, method="drafter"),
        report.LOSSLESS: common,
    }
    for alpha in options.alphas:
        for rule in report.COMPARED:
            found[report.label(rule, alpha)] = dataclasses.replace(common, rule=rule, alpha=alpha)
    Runner(pair, chosen)  # rejects parts that do not go together, before anything compiles
    if chosen not in found.values():
        found[report.chosen_label(chosen)] = chosen
    return found


def _measure(
    pair: LoadedPair,
    examples: Sequence[Example],
    methods: dict[str, Settings],
    options: DemoOptions,
    progress: Callable[[str], None],
) -> DemoResult:
    """Compiles every method, then runs rounds of all methods, each beginning with another one."""
    texts = [example.inputs for example in examples]
    compile_s = 0.0
    for name, settings in methods.items():
        progress(f"compiling {name}")
        compile_s += pair.run(texts[:1], settings).timing.compile_s
    rounds: dict[str, list[Generation]] = {name: [] for name in methods}
    order = list(methods)
    for i in range(options.repeats):
        # Drift of the machine, and the effects of running first or last, then affect every method alike.
        for name in order[i % len(order) :] + order[: i % len(order)]:
            progress(f"round {i + 1} of {options.repeats}: {name}")
            settings = dataclasses.replace(methods[name], seed=options.settings.seed + i)
            rounds[name].append(pair.run(texts, settings, range(len(texts))))
    alone = [_tokens_per_s(generation) for generation in rounds[report.VERIFIER]]
    results = {n: _result(n, s, rounds[n], alone, examples) for n, s in methods.items()}
    timings = [generation.timing for each in rounds.values() for generation in each]
    compile_s += sum(timing.compile_s for timing in timings)
    return DemoResult(options, tuple(examples), results, compile_s, sum(timing.decode_s for timing in timings))


def _result(
    name: str,
    settings: Settings,
    rounds: Sequence[Generation],
    alone: Sequence[float],
    examples: Sequence[Example],
) -> MethodResult:
    """Summarises the rounds of one method; `alone` is the verifier's tokens/s in each round."""
    judged = [
        (example.reference, record["prediction"])
        for generation in rounds
        for example, record in zip(examples, generation.records, strict=True)
        if example.reference is not None
    ]
    quality: dict[str, float] = {}
    if judged:
        texts = [list(side) for side in zip(*judged, strict=True)]
        quality = metrics.exact_match(*texts) | metrics.character_accuracy(*texts)
    speeds = [_tokens_per_s(generation) for generation in rounds]
    totals = accounting.total(generation.totals for generation in rounds)
    return MethodResult(
        label=name,
        settings=settings,
        exact_match=quality.get("exact_match"),
        character_accuracy=quality.get("character_accuracy"),
        tokens_per_s=statistics.median(speeds),
        speedups=tuple(speed / base for speed, base in zip(speeds, alone, strict=True)),
        rates=accounting.rates(totals),
        first=rounds[0],
    )


def _tokens_per_s(generation: Generation) -> float:
    return generation.totals["committed"] / generation.timing.decode_s


if __name__ == "__main__":
    from speccascade_t5x.cli.__main__ import run_verb
    from speccascade_t5x.cli.streams import end

    end(run_verb(main, sys.argv[1:], "speccascade demo"))
