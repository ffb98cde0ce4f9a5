"""`speccascade demo`, run for real on the packaged pair, and its notes on scripted results."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from speccascade_t5x.cli import demo, demo_report
from speccascade_t5x.cli.__main__ import run_verb
from speccascade_t5x.common import paths
from speccascade_t5x.inference import generate
from speccascade_t5x.inference.generate import Generation, Settings, Timing
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.text.vocabulary import ByteVocabulary

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = paths.pretrained_dir() / demo.PAIR
needs_bundle = pytest.mark.skipif(
    not (BUNDLE / "bundle.json").is_file(), reason=f"needs the packaged pair {demo.PAIR}, which this checkout lacks"
)
METHODS = [
    *("verifier alone", "drafter alone", "lossless speculation"),
    *("TokenV3 alpha 0.3", "MinP alpha 0.3", "TokenV3 alpha 0.9", "MinP alpha 0.9"),
    "chosen: lossy_sd residual=optimal alpha 0.2 block verification",
]
GIVEN = "Schöne Grüße aus [Köln]"


@dataclasses.dataclass(frozen=True)
class Run:
    result: demo.DemoResult
    output: str
    progress: list[str]


@pytest.fixture(scope="module")
def run() -> Run:
    """Three packaged sentences, one given text with umlauts and one given text in folded form."""
    file, progress = io.StringIO(), []
    console = Console(file=file, width=80, highlight=False, _environ={})
    chosen = Settings(
        draft_len=5, rule="lossy_sd", rule_options={"residual": "optimal"}, alpha=0.2, verification="block"
    )
    options = demo.DemoOptions(BUNDLE, texts=(GIVEN, "grune apfel"), sentences=3, repeats=2, settings=chosen)
    result = demo.run_demo(options, console, progress.append)
    return Run(result, file.getvalue(), progress)


@needs_bundle
def test_every_method_decodes_every_text(run):
    assert list(run.result.methods) == METHODS
    assert [e.reference for e in run.result.examples] == [GIVEN, None, *demo.packaged_sentences()[:3]]
    assert run.result.examples[0].inputs == "schone grusse aus [koln]"
    for row in run.result.methods.values():
        assert [r["inputs"] for r in row.first.records] == [e.inputs for e in run.result.examples]
        assert row.character_accuracy > 70  # the pair does its job; what is lost is a few letters
        assert row.tokens_per_s > 0
        assert len(row.speedups) == 2


@needs_bundle
def test_the_verifier_alone_is_the_measure_of_speed(run):
    assert run.result.methods["verifier alone"].speedups == (1.0, 1.0)
    assert run.result.compile_s > 0
    assert run.result.decode_s > 0


@needs_bundle
def test_the_costs_are_those_of_the_method(run):
    rates = {name: row.rates for name, row in run.result.methods.items()}
    assert rates["verifier alone"]["verifier_calls_per_token"] == 1
    assert rates["drafter alone"]["verifier_calls_per_token"] == 0
    assert rates["drafter alone"]["drafter_calls_per_token"] == 1
    for name in METHODS[2:]:
        assert 1 / 6 <= rates[name]["verifier_calls_per_token"] < 0.5, name  # 6 = draft length and bonus
        assert 0.8 < rates[name]["acceptance"] <= 1, name


@needs_bundle
def test_the_output_fits_80_columns_and_has_no_escape_codes(run):
    assert "\x1b" not in run.output
    lines = run.output.splitlines()
    assert max(map(len, lines)) <= 80
    for name in METHODS[:7]:
        row = next(line for line in lines if line.startswith(f"{name} "))
        assert len(row[len(name) :].split()) == (6 if name == "verifier alone" else 7), row  # nothing is wrapped


@needs_bundle
def test_the_given_texts_are_the_ones_shown(run):
    shown = run.output[run.output.index("Who wrote what") :]
    assert shown.index("schone grusse aus [koln]") < shown.index(GIVEN) < shown.index("grune apfel")
    vocabulary = ByteVocabulary()
    record = run.result.methods["lossless speculation"].first.records[0]
    text = demo_report.colour.trace(vocabulary.decode_pieces(record["tokens"]), record["source"], colour=False)
    assert text.plain in shown
    assert "plain: accepted draft" in shown
    assert f"Machine: {demo_report.machine()}." in " ".join(shown.split())
    assert "s of it compiling" in " ".join(shown.split())


@needs_bundle
def test_progress_tells_compiling_from_rounds(run):
    assert run.progress[:8] == [f"compiling {name}" for name in METHODS]
    assert len(run.progress) == 8 + 2 * 8 + 1
    assert run.progress[-1] == ""
    # The second round begins with another method than the first.
    assert run.progress[8].endswith("1 of 2: verifier alone")
    assert run.progress[16].endswith("2 of 2: drafter alone")


def test_help_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "speccascade_t5x.cli.demo", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f"--{name}" in done.stdout for name in ("text", "alphas", "bundle", "width"))


@pytest.mark.slow  # compiles everything once more
@needs_bundle
def test_the_module_runs_as_a_program_without_escape_codes():
    """As a user's pipe sees it, in an encoding that has no umlauts."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "XLA_FLAGS", "COLUMNS")}
    done = subprocess.run(
        [sys.executable, "-m", "speccascade_t5x.cli.demo", "--sentences=0", "--text=Tür zu!", "--repeats=1"],
        cwd=ROOT,
        env={**inherited, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""
    assert "T?r zu!" in done.stdout


@needs_bundle
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": ("ä" * 90,)}, "has 91 tokens when folded, end of text included, but the pair reads 80"),
        ({"texts": ("zwei\nZeilen",)}, "must be one line"),
        ({"texts": ("  ",)}, "must be one line"),
        ({"texts": ("\udcfc",)}, "is not valid Unicode"),
        ({"sentences": 0}, "nothing to decode"),
        ({"sentences": -1}, "--sentences=-1 is too small"),
        ({"repeats": 0}, "--repeats=0 is too small"),
        ({"settings": Settings(draft_len=0)}, "--draft_len=0 is too small"),
        ({"settings": Settings(rule="opt")}, "alpha"),
    ],
)
def test_bad_options_stop_before_anything_is_decoded(options, message):
    progress = []
    with pytest.raises(UserError, match=message):
        demo.run_demo(demo.DemoOptions(BUNDLE, **options), Console(file=io.StringIO()), progress.append)
    assert progress == []


def test_a_missing_bundle_is_named(tmp_path):
    with pytest.raises(UserError, match="no_such_pair"):
        demo.run_demo(demo.DemoOptions(tmp_path / "no_such_pair"), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    "alphas", [["0.3"], ["0.3", "1.5"], ["-0.1", "0.5"], ["0.3", "x"], ["nan", "0.5"], ["0.4,0.4"]]
)
def test_bad_alphas_name_the_range(alphas):
    with pytest.raises(UserError, match="two different numbers from 0 to 1"):
        demo.parse(["--alphas", *alphas])


@pytest.mark.parametrize("flags", [["--alphas", "0", "1"], ["--alphas=0,1"], ["--alphas", "0,", "1"]])
def test_alphas_may_be_written_in_both_ways(flags):
    assert demo.parse(flags)[0].alphas == (0.0, 1.0)


def test_flags_reach_the_options():
    options, width = demo.parse(["--text", "Ä", "--text=ö", "--sentences=2", "--width=60", "--seed=4", "--repeats=5"])
    settings = Settings(draft_len=5, seed=4)
    assert options == demo.DemoOptions(BUNDLE, texts=("Ä", "ö"), sentences=2, settings=settings, repeats=5)
    assert width == 60
    assert demo.parse([]) == (demo.DemoOptions(BUNDLE), None)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--rule=opt", "--alpha=0.1", "--verification=block"], {"rule": "opt", "alpha": 0.1, "verification": "block"}),
        (["--gin_file=rules/token_v3.gin", "--alpha=0.5"], {"rule": "token_v3", "alpha": 0.5}),
        (["--gin.generate.Settings.draft_len=3", "--method=bild"], {"draft_len": 3, "method": "bild"}),
        (["--draft_stop=confidence", "--stop_threshold=0.5"], {"draft_stop": "confidence", "stop_threshold": 0.5}),
    ],
)
def test_any_method_is_chosen_by_flags_or_gin(flags, wanted):
    assert demo.parse(flags)[0].settings == Settings(**{"draft_len": 5} | wanted)


def test_a_method_of_the_table_makes_no_second_row():
    settings = Settings(draft_len=5, rule="token_v3", alpha=0.3)
    pair = generate.load(BUNDLE)
    assert list(demo._methods(demo.DemoOptions(BUNDLE, settings=settings), pair)) == METHODS[:7]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tekst", "a"], "unknown flag '--tekst': did you mean '--text'?"),
        (["--repeats", "many"], "invalid int value: 'many'"),
        (["--temperature=3"], "temperature=3.0 is outside its range"),
        (["--seed=-1"], "seed=-1 is"),
        (["--num_beams=4"], "num_beams is not supported"),
        (["--gin_file=rules/none.gin"], "rules/none.gin was not found"),
        (["--width=5"], "--width=5 is too narrow"),
    ],
)
def test_bad_flags_give_one_line_and_exit_code_2(flags, message, capsys):
    assert run_verb(demo.main, flags, "speccascade demo") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("speccascade demo: ")
    assert error.count("\n") == 1


def test_the_packaged_sentences():
    sentences = demo.packaged_sentences()
    assert len(sentences) == len(set(sentences)) == 40
    for sentence in sentences:
        assert 12 <= len(sentence.encode()) <= 75, sentence
        assert sentence.isprintable(), sentence
        assert fold(sentence) != sentence, sentence


def scripted(options: dict | None = None, **quality: tuple[float, float]) -> demo.DemoResult:
    """A result with the given (exact match, character accuracy) of verifier, lossless, v3 and min_p."""
    options = demo.DemoOptions(BUNDLE, alphas=(0.3,), **(options or {}))
    names = {"verifier": METHODS[0], "lossless": METHODS[2], "v3": METHODS[3], "min_p": METHODS[4]}
    rows = {}
    for key, name in names.items():
        settings = Settings(method="verifier" if key == "verifier" else "speculative")
        speedups = (1.0, 1.0) if key == "verifier" else (1.2, 1.4)
        first = Generation([], Timing(), {})
        rows[name] = demo.MethodResult(name, settings, *quality.get(key, (None, None)), 1.0, speedups, {}, first)
    return demo.DemoResult(options, (demo.Example("a", "A"),), rows, 0.0, 0.0)


def test_a_gain_that_min_p_has_too_is_called_truncation():
    result = scripted(verifier=(20, 90), lossless=(20, 90.5), v3=(30, 92), min_p=(31, 92.5))
    (note,) = demo_report.truncation_notes(result)
    assert note.startswith(
        "TokenV3 alpha 0.3 gains 10.0 points of exact match and 2.0 of character accuracy over the verifier alone. "
    )
    assert "gains +11.0 and +2.5: all of that can come from leaving out unlikely tokens (truncation)" in note


def test_a_gain_that_min_p_shares_in_part_is_split():
    result = scripted(verifier=(20, 90), lossless=(20, 90), v3=(30, 92), min_p=(31, 91.2))
    (note,) = demo_report.truncation_notes(result)
    assert "gains +11.0 and +1.2: that part can come from leaving out" in note


def test_a_gain_that_min_p_lacks_is_not_blamed_on_truncation():
    result = scripted(verifier=(20, 90), lossless=(20, 90), v3=(30, 89), min_p=(19.5, 95))
    (note,) = demo_report.truncation_notes(result)
    assert "gains 10.0 points of exact match over the verifier alone." in note
    assert note.endswith("gains -0.5: leaving out unlikely tokens (truncation) does not explain it.")


@pytest.mark.parametrize(("lossless", "chance"), [((30, 88), True), ((25, 88), False), ((10, 93), True)])
def test_a_gain_no_larger_than_chance_says_so(lossless, chance):
    result = scripted(verifier=(20, 90), lossless=lossless, v3=(30, 92), min_p=(30, 92))
    (note,) = demo_report.truncation_notes(result)
    assert ("over the verifier alone, within chance." in note) is chance


@pytest.mark.parametrize("v3", [(20, 90), (15, 85), (20, 90.04)])
def test_no_gain_needs_no_explanation(v3):
    assert demo_report.truncation_notes(scripted(verifier=(20, 90), lossless=(20, 90), v3=v3, min_p=(30, 95))) == []


def test_the_two_methods_of_one_law_are_the_yardstick():
    (note,) = demo_report.chance_notes(scripted(verifier=(20, 90), lossless=(22.5, 88.2)))
    assert "the 2.5 points of exact match and 1.8 of character accuracy between the two are chance" in note
    assert "(1 text, 3 seeds)" in note
    (note,) = demo_report.chance_notes(scripted(verifier=(20, 90), lossless=(20, 88.2)))
    assert "the 1.8 points of character accuracy between" in note
    (note,) = demo_report.chance_notes(scripted(verifier=(20, 90), lossless=(20, 90)))
    assert note == "Quality is that of one sample (1 text, 3 seeds): small differences show nothing."
    (note,) = demo_report.chance_notes(
        scripted({"settings": Settings(temperature=0.0)}, verifier=(20, 90), lossless=(20, 90))
    )
    assert note.startswith("At temperature 0 lossless speculation writes what the verifier alone writes")


def test_without_references_quality_is_not_judged():
    (note,) = demo_report.chance_notes(scripted())
    assert note.startswith("Quality is not judged")
    assert demo_report.truncation_notes(scripted()) == []


@pytest.mark.parametrize(
    ("speedups", "says"), [((0.9, 0.95), "No speculative method was faster"), ((1.0, 2.0), "differ widely")]
)
def test_disappointing_speed_is_not_passed_over(speedups, says):
    result = scripted()
    assert demo_report.speed_notes(result) == []
    slower = {
        name: dataclasses.replace(row, speedups=speedups) if name != "verifier alone" else row
        for name, row in result.methods.items()
    }
    (note,) = demo_report.speed_notes(dataclasses.replace(result, methods=slower))
    assert says in note
