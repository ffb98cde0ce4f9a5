"""Any value of any option ends in a result or in one sentence: random ones for every verb, without a traceback."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import gin
import hypothesis
import pytest
from hypothesis import strategies as st

from speccascade_t5x.cli import __main__ as cli

# What makes each verb end before it works, whatever else is asked of it; `plan` from given figures is quick.
BASE = {
    "cache": ["--task=nowhere", "--output_dir=out"],
    "demo": ["--bundle=nowhere"],
    "export": ["--source=nowhere", "--target=out", "--format=bundle"],
    "infer": ["--input=nowhere.txt", "--pair=nowhere"],
    "inspect": ["nowhere"],
    "plan": ["--acceptance=0.8", "--costs=0.2"],
    "precompile": ["--pairs=restore_de_drafter:restore_de_verifier", "--topologies=nowhere"],
    "slice_plan": ["--pair=restore_de_drafter:restore_de_verifier", "--topology=nowhere", "--acceptance=0.8"],
    "sweep": ["--input=nowhere.jsonl", "--pair=nowhere", "--output_dir=out"],
    "tables": ["--cached=nowhere", "--pair=nowhere", "--output_dir=out"],
    "train": ["--model=restore_de_drafter", "--cached=nowhere", "--output_dir=out"],
    "train_deferral": ["--cached=nowhere", "--pair=nowhere", "--output_dir=out"],
}
# Flags that start processes, or whose value is no option's.
LEFT_OUT = ("--multihost", "--help", "--gin", "--module", "--gin_file", "--gin_allow_module")
VALUES = [
    *("0", "-1", "1", "2", "1.5", "2147483648", "-9223372036854775809", "4294967296", "9" * 5000),
    *("1e-30", "1e-40", "1e-46", "1e39", "1e400", "nan", "inf", "-inf", "True", "None", "", " ", "x", "a=b", ",", ";"),
    *("()", "[]", "{}", "(1,)", "('a',)", "[None]", "((1,),)", "[['a']]", "{1: 1}", "{'a': None}", "'x'", "b'x'"),
    *("'\\x00'", "'\\ud800'", "[1", "%LIMIT", "@nothing", "@generate.Settings()", "[" * 500),
]


def bindings(verb: str) -> list[str]:
    """What --gin.NAME may set: all arguments and fields of what the verb configures."""
    from speccascade_t5x.checkpoints import export
    from speccascade_t5x.data import cache
    from speccascade_t5x.deferral import fitting
    from speccascade_t5x.evaluation import sweep
    from speccascade_t5x.inference import generate, infer
    from speccascade_t5x.models import t5
    from speccascade_t5x.planning import plan, slice_plan
    from speccascade_t5x.tpu import precompile, slice_cells
    from speccascade_t5x.training import losses, optimizers, tables, train, train_loop
    from speccascade_t5x.training.deferral import train_deferral

    settings = {"generate.Settings": generate.Settings}
    known: dict[str, dict[str, Callable]] = {
        "cache": {"cache.cache": cache.cache},
        "demo": settings,
        "export": {"export.export": export.export},
        "infer": settings | {"infer.infer": infer.infer},
        "plan": settings | {"plan.plan": plan.plan},
        "precompile": {"precompile.precompile": precompile.precompile, "slice_cells.Options": slice_cells.Options},
        "slice_plan": {"slice_plan.slice_plan": slice_plan.slice_plan},
        "sweep": settings | {"sweep.sweep": sweep.sweep},
        "tables": {"tables.tables": tables.tables},
        "train": {
            "train.train": train.train,
            "train.Data": train.Data,
            "train_loop.TrainConfig": train_loop.TrainConfig,
            "losses.LossConfig": losses.LossConfig,
            "optimizers.Adafactor": optimizers.Adafactor,
            "optimizers.Schedule": optimizers.Schedule,
            "t5.T5Config": t5.T5Config,
        },
        "train_deferral": {
            "train_deferral.train_deferral": train_deferral.train_deferral,
            "train_deferral.Data": train_deferral.Data,
            "train_deferral.HeadOptions": train_deferral.HeadOptions,
            "fitting.FitConfig": fitting.FitConfig,
        },
    }
    return [
        f"--gin.{prefix}.{name}"
        for prefix, configured in known.get(verb, {}).items()
        for name in inspect.signature(configured).parameters
    ]


def flags(verb: str, capsys: pytest.CaptureFixture) -> list[str]:
    """The flags that the help of a verb lists."""
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    found = dict.fromkeys(re.findall(r"^ +(--\w+)", capsys.readouterr().out, re.MULTILINE))
    return [flag for flag in found if flag not in LEFT_OUT]


def attack(verb: str, tries: int, capsys: pytest.CaptureFixture) -> None:
    options = [*flags(verb, capsys), *bindings(verb)]
    values = st.sampled_from(VALUES) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(repr)
    some = st.lists(st.tuples(st.sampled_from(options), values).map("=".join), min_size=1, max_size=3)

    @hypothesis.settings(max_examples=tries, derandomize=True, deadline=None, database=None)
    @hypothesis.given(some if options else st.just(["--x"]))
    def run(chosen: list[str]) -> None:
        try:
            code = cli.main([verb, *BASE.get(verb, []), *chosen])
        finally:
            gin.clear_config()
        said = capsys.readouterr().err
        assert code in (0, 2), said
        assert code == 0 or re.fullmatch(rf"speccascade {verb}: [^\n]+\n", said), said

    run()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_no_value_brings_a_traceback(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack(verb, 40, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("verb", cli.VERBS)
def test_no_value_of_two_thousand_brings_a_traceback(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack(verb, 2000, capsys)
