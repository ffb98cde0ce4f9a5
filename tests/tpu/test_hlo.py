"""Costs read from a program's text: loops multiplied out, branches as a span, rounds by themselves. All by hand."""

from __future__ import annotations

import pytest

from speccascade_t5x.distributed import collectives
from speccascade_t5x.tpu import hlo

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{0}","iteration_bounds":["1"]}}}}'


def op(name: str, cycles: int | None = None, what: str = "add(%a, %b)", root: bool = False) -> str:
    tail = "" if cycles is None else ", " + CYCLES.format(cycles)
    return f"  {'ROOT ' if root else ''}%{name} = f32[8]{{0:T(128)}} {what}{tail}"


def counting(name: str, trips: int) -> list[str]:
    return [
        f"%{name} (p: (s32[], f32[8])) -> pred[] {{",
        f"  %limit.{name} = s32[]{{:T(128)}} constant({trips})",
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0",
        f"  ROOT %less = pred[]{{:T(512)}} compare(%i, %limit.{name}), direction=LT",
        "}",
    ]


def loop(condition: str, body: str, name: str = "w") -> str:
    metadata = 'metadata={op_name="jit(run)/while(body=%wrong, condition=%wrong)"}'
    return f"  %{name} = (s32[], f32[8]{{0}}) while(%t), condition=%{condition}, body=%{body}, {metadata}"


def either(*branches: str) -> str:
    return f"  %c = f32[8]{{0}} conditional(%k, %x, %y), branch_computations={{{', '.join('%' + b for b in branches)}}}"


REDUCE = "all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%sum"
TEXT = "\n".join(
    [
        "HloModule jit_run, is_scheduled=true",
        # A fusion's inside is part of the fusion, and must not be counted again.
        "%fused (a: f32[8]) -> f32[8] {",
        op("inside", 999, root=True),
        "}",
        "%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {",
        op("f", 10, "fusion(%x), kind=kLoop, calls=%fused"),
        op("r", None, REDUCE),
        "}",
        *counting("inner_condition", 4),
        "%cheap (p: f32[8]) -> f32[8] {",
        op("n", 1, root=True),
        "}",
        "%dear (p: f32[8]) -> f32[8] {",
        op("s", 50, root=True),
        op("g", None, "all-gather(%x), dimensions={0}"),
        "}",
        "%round_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {",
        op("a", 100),
        loop("inner_condition", "inner_body"),
        either("cheap", "dear"),
        "}",
        "%round_condition (p: (s32[], f32[8])) -> pred[] {",
        "  %i = s32[]{:T(128)} get-tuple-element(%p), index=0",
        "  %limit = s32[]{:T(128)} get-tuple-element(%p), index=1",
        "  %d = s32[]{:T(128)} all-reduce(%i), channel_id=2, to_apply=%sum",
        "  ROOT %less = pred[]{:T(512)} compare(%d, %limit), direction=LT",
        "}",
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        op("before", 7),
        loop("round_condition", "round_body", "rounds"),
        op("after", 8, root=True),
        "}",
    ]
)


def test_a_round_and_the_rest():
    found = hlo.costs(TEXT)
    assert (found.once.least, found.once.most) == (15, 15)
    assert (found.round.least, found.round.most) == (100 + 4 * 10 + 1, 100 + 4 * 10 + 50)
    assert found.round.looped == 40
    # Four in the inner loop, one in the condition; the gather of the dearer branch counts as sent.
    assert found.round.collectives == {"all-reduce": (5, 4 * 32 + 4), "all-gather": (1, 32)}
    assert found.round.sent == 4 * 32 + 4 + 32
    assert found.once.collectives == {} and found.round.unknown == 0


def test_a_program_without_rounds_is_one_run():
    constant = TEXT.replace("condition=%round_condition", "condition=%inner_condition")
    found = hlo.costs(constant)
    assert found.round is None
    assert found.once.most == 15 + 4 * 190 and found.once.looped == 4 * 190


def test_a_loop_of_unknown_length_inside_a_round_is_counted_once_and_told():
    inside = TEXT.replace("constant(4)", "get-tuple-element(%p), index=1")
    found = hlo.costs(inside)
    assert found.round.most == 100 + 10 + 50 and found.round.unknown == 1


def test_two_open_loops_are_no_round():
    twice = TEXT.replace(op("after", 8, root=True), loop("round_condition", "round_body", "more"))
    found = hlo.costs(twice)
    assert found.round is None and found.once.unknown == 2 and found.once.most == 7 + 2 * 190


@pytest.mark.parametrize("trips", [1, 24])
def test_trips_multiply(trips):
    found = hlo.costs(TEXT.replace("constant(4)", f"constant({trips})"))
    assert found.round.least == 100 + 10 * trips + 1
    assert found.round.collectives["all-reduce"][0] == trips + 1


@pytest.mark.parametrize(
    ("line", "nbytes"),
    [
        ("(f32[8]{0}, bf16[4]{0}) all-reduce(%x, %y)", 40),
        ("(f32[8]{0}, bf16[4]{0}) all-reduce-start(%x, %y)", 40),  # several in one, and no operand among them
        ("f32[8]{0} all-reduce-start(%x)", 32),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%x)", 32),
        ("((f32[2]{0}, f32[4]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%x, %y)", 96),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x)", 32),
        ("f32[8]{0} all-gather-done(%x)", None),
    ],
)
def test_what_a_collective_sends(line, nbytes):
    found = [each.nbytes for each in collectives.in_program(f"  %c = {line}, channel_id=1")]
    assert found == ([] if nbytes is None else [nbytes])
