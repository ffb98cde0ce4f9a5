"""The planner for a slice: where its figures come from, what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from speccascade_t5x.inference import plan_files
from speccascade_t5x.interfaces import UserError
from speccascade_t5x.models import T5Config
from speccascade_t5x.planning import roofline, slice_plan
from speccascade_t5x.tpu import hardware

DRAFTER = T5Config(
    vocab_size=128, emb_dim=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, head_dim=16, mlp_dim=128,
    dtype="bfloat16",
)  # fmt: skip
VERIFIER = dataclasses.replace(DRAFTER, emb_dim=512, mlp_dim=2048, num_heads=8, head_dim=64, num_decoder_layers=6)


def planned(tmp_path=None, **choices):
    chosen = {"acceptance": (0.8,), "draft_lens": (1, 4), "batch_sizes": (1, 4096), "model": 1} | choices
    return slice_plan.slice_plan((DRAFTER, VERIFIER), "a:b", "v4:2x2x1", output_dir=tmp_path, **chosen)


def test_every_choice_is_predicted_by_the_roofline(tmp_path):
    found = planned(tmp_path / "out")
    place = roofline.Place(hardware.CHIPS["v4"], 4, 1)
    decode = roofline.Decode(DRAFTER, VERIFIER, 512, 128)
    assert [(each.batch, each.draft_len) for each in found.predicted] == [(b, g) for b in (1, 4096) for g in (0, 1, 4)]
    assert found.predicted[2].seconds == roofline.round_seconds(decode, place, 1, 4)
    assert found.best(1).draft_len == 4 and found.best(1).gain > 1.0
    content = json.loads((tmp_path / "out" / slice_plan.FILE).read_text("utf-8"))
    assert content["predicted"][2]["gain"] == found.predicted[2].gain and content["model"] == 1
    table = found.path.read_text("utf-8")
    assert table.count("\n| ") == 7 and f"batch 1: draft_len 4 gains {found.best(1).gain:.2f}x" in table
    assert slice_plan.plain(found).splitlines()[0] == "a:b on v4:2x2x1, model=1"


def test_it_says_when_to_stop():
    found = planned(acceptance=(0.0,))
    assert found.stops_at == 1 and slice_plan.verdict(found)[-1] == "speculation stops paying at batch 1"
    assert "batch 1: do not speculate" in slice_plan.verdict(found)
    assert slice_plan.verdict(planned(batch_sizes=(1,)))[-1].startswith("speculation pays at every batch size")
    huge = planned(batch_sizes=(10**7,))
    assert slice_plan.verdict(huge)[0] == "batch 10000000: does not fit"


def test_what_does_not_fit_is_not_advised():
    found = planned(batch_sizes=(1,))
    alone, short, long = found.predicted
    assert found.best(1) is long
    tight = dataclasses.replace(found, predicted=(alone, short, dataclasses.replace(long, fits=False)))
    assert tight.best(1) is short
    assert slice_plan.verdict(tight)[0] == f"batch 1: draft_len 1 gains {short.gain:.2f}x"


def test_a_plan_made_elsewhere_is_followed(tmp_path):
    ranked = [
        {"drafter": "model", "draft_len": 4, "tokens_per_round": 2.5},
        {"drafter": "max_gram", "draft_len": 1, "tokens_per_round": 9.0},
        {"drafter": "model", "draft_len": 0, "tokens_per_round": 1.0},
    ]
    conditions = {"rule": "chow", "alpha": 0.5}
    plan_files.write(tmp_path / plan_files.FILE, {"candidates": ranked, "conditions": conditions})
    found = planned(acceptance=None, plan=str(tmp_path / plan_files.FILE))
    assert {each.draft_len: each.tokens_per_round for each in found.predicted} == {0: 1.0, 4: 2.5}
    place = roofline.Place(hardware.CHIPS["v4"], 4, 1)
    reads = roofline.Decode(DRAFTER, VERIFIER, 512, 128, reads=True)  # chow reads the drafter
    assert found.predicted[1].seconds == roofline.round_seconds(reads, place, 1, 4)
    with pytest.raises(UserError, match="ranks a drafter of draft lengths 4: give some of these as draft_lens"):
        planned(acceptance=None, plan=str(tmp_path), draft_lens=(2,))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"acceptance": None}, "name either the acceptance"),
        ({"plan": "x"}, "name either the acceptance"),
        ({"acceptance": (1.2,)}, "acceptance=1.2 is outside its range"),
        ({"draft_lens": (0,)}, "draft_lens=0 is outside its range"),
        ({"batch_sizes": (0,)}, "batch_sizes=0 is outside its range"),
        ({"model": 3}, "model=3 does not divide the 4 chips"),
        ({"acceptance": None, "plan": "nowhere.json"}, "there is no plan nowhere.json"),
    ],
)
def test_mistakes_are_one_sentence(choices, message):
    with pytest.raises(UserError, match=message):
        planned(**choices)
