"""Every model file builds its published shapes. Nothing is computed: shapes are abstract.

Architectures: Raffel et al. 2020 (T5 1.0, 1.1 in its released configurations), Chung et al. 2022 (FLAN-T5: 1.1's),
Xue et al. 2021 (mT5) and 2022 (ByT5).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import gin
import jax
import pytest

from speccascade_t5x.cli import gin_flags
from speccascade_t5x.common import paths
from speccascade_t5x.models import t5

FOLDER = paths.gin_configs_dir() / "models"
OWN = {"flan_t5_small_de", "restore_de_drafter", "restore_de_verifier"}


class Shape(NamedTuple):
    """A row of the published tables, with the exact and the published count of parameters."""

    vocab: int
    emb: int
    heads: int
    encoder: int
    decoder: int
    head: int
    mlp: int
    gated: bool
    exact: int
    published: float


# vocabulary, width, heads, encoder and decoder layers, head width, mlp width, gated, exact, published
T5_1_0 = {
    "t5_1_0_small": Shape(32128, 512, 8, 6, 6, 64, 2048, False, 60_506_624, 60e6),
    "t5_1_0_base": Shape(32128, 768, 12, 12, 12, 64, 3072, False, 222_903_552, 220e6),
    "t5_1_0_large": Shape(32128, 1024, 16, 24, 24, 64, 4096, False, 737_668_096, 770e6),
    "t5_1_0_3b": Shape(32128, 1024, 32, 24, 24, 128, 16384, False, 2_851_598_336, 3e9),
    "t5_1_0_11b": Shape(32128, 1024, 128, 24, 24, 128, 65536, False, 11_307_321_344, 11e9),
}
T5_1_1 = {
    "t5_1_1_small": Shape(32128, 512, 6, 8, 8, 64, 1024, True, 76_961_152, 77e6),
    "t5_1_1_base": Shape(32128, 768, 12, 12, 12, 64, 2048, True, 247_577_856, 250e6),
    "t5_1_1_large": Shape(32128, 1024, 16, 24, 24, 64, 2816, True, 783_150_080, 780e6),
    "t5_1_1_xl": Shape(32128, 2048, 32, 24, 24, 64, 5120, True, 2_849_757_184, 3e9),
    "t5_1_1_xxl": Shape(32128, 4096, 64, 24, 24, 64, 10240, True, 11_135_332_352, 11e9),
}
MT5 = {
    "mt5_small": Shape(250112, 512, 6, 8, 8, 64, 1024, True, 300_176_768, 300e6),
    "mt5_base": Shape(250112, 768, 12, 12, 12, 64, 2048, True, 582_401_280, 580e6),
    "mt5_large": Shape(250112, 1024, 16, 24, 24, 64, 2816, True, 1_229_581_312, 1.2e9),
    "mt5_xl": Shape(250112, 2048, 32, 24, 24, 64, 5120, True, 3_742_619_648, 3.7e9),
    "mt5_xxl": Shape(250112, 4096, 64, 24, 24, 64, 10240, True, 12_921_057_280, 13e9),
}
BYT5 = {
    "byt5_small": Shape(384, 1472, 6, 12, 4, 64, 3584, True, 299_637_760, 300e6),
    "byt5_base": Shape(384, 1536, 12, 18, 6, 64, 3968, True, 581_653_248, 582e6),
    "byt5_large": Shape(384, 1536, 16, 36, 12, 64, 3840, True, 1_228_183_552, 1.23e9),
    "byt5_xl": Shape(384, 2560, 32, 36, 12, 64, 6720, True, 3_737_801_728, 3.74e9),
    "byt5_xxl": Shape(384, 4672, 64, 36, 12, 64, 12352, True, 12_906_899_328, 12.9e9),
}
FLAN = {name.replace("t5_1_1", "flan_t5"): shape for name, shape in T5_1_1.items()}
SHAPES = T5_1_0 | T5_1_1 | FLAN | MT5 | BYT5
# The 1.0 paper rounds its large model up by 4%, and 3B stands for 2.85 billion.
ROUNDING = 0.055
BUCKETS = 32  # of relative positions


def by_formula(s: Shape) -> int:
    """Parameters of an encoder-decoder, counted from the architecture alone."""
    attention = 4 * s.emb * s.heads * s.head  # query, key, value, output
    mlp = (3 if s.gated else 2) * s.emb * s.mlp
    encoder = s.encoder * (attention + mlp + 2 * s.emb)  # a norm before each part
    decoder = s.decoder * (2 * attention + mlp + 3 * s.emb)
    both = 2 * (s.emb + BUCKETS * s.heads)  # last norm, relative positions
    embeddings = s.vocab * s.emb * (2 if s.gated else 1)  # 1.1 has logits of its own
    return embeddings + encoder + decoder + both


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config()


def configured(name: str) -> t5.T5Config:
    gin_flags.load([f"models/{name}.gin"], [])
    return gin.get_configurable(t5.T5Config)()


def test_every_model_has_a_file():
    assert {path.stem for path in FOLDER.glob("*.gin")} == set(SHAPES) | OWN


@pytest.mark.parametrize("name", SHAPES)
def test_the_counts_are_the_published_ones(name):
    """Our literals against the formula, and both against the rounded number of the paper."""
    shape = SHAPES[name]
    assert by_formula(shape) == shape.exact
    assert shape.exact == pytest.approx(shape.published, rel=ROUNDING)


@pytest.mark.parametrize("name", FLAN)
def test_flan_is_t5_1_1(name):
    assert configured(name) == configured(name.replace("flan_t5", "t5_1_1"))


@pytest.mark.parametrize("name", sorted(set(SHAPES) - set(FLAN)))
def test_a_file_builds_its_model(name):
    shape, config = SHAPES[name], configured(name)
    leaves = jax.tree_util.tree_leaves_with_path(t5.param_shapes(config))
    assert sum(math.prod(leaf.shape) for _, leaf in leaves) == shape.exact
    sizes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    assert sizes["['token_embedder']['embedding']"] == (shape.vocab, shape.emb)
    assert config.num_encoder_layers == shape.encoder and config.num_decoder_layers == shape.decoder
    assert (config.num_heads, config.head_dim, config.mlp_dim) == (shape.heads, shape.head, shape.mlp)
    assert ("['decoder']['logits_dense']['kernel']" in sizes) is shape.gated
    assert config.logits_via_embedding is not shape.gated
    assert config.mlp_activations == (("gelu", "linear") if shape.gated else ("relu",))
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("name", sorted(set(SHAPES) | OWN))
def test_the_header_says_what_may_be_overridden(name):
    header = Path(FOLDER / f"{name}.gin").read_text("utf-8").partition("from __gin__")[0]
    assert "\n# Commonly overridden: " in header
    assert " million parameters" in header or " billion parameters" in header or name.startswith("flan")
