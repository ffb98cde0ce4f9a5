"""What a round costs between the models' logits and the next token, at the size of a real vocabulary.

    python benchmarks/verify.py [--repeats 9] [--output verify.json]

B = 8, G = 5, V = 32,128, float32, no truncation unless said. A round of `Speculative` is run with models that
answer stored logits, so that what is left is the whole of it: the sampler (the laws of both models, raw and at the
temperature), the rule's target, deferral, verification, the residual or bonus token, log-probabilities and counters.
"Rule + verify" is the same from stored distributions: all of it but the sampler.

Measured beside them, in turn: one softmax over the logits the rule reads (the verifier's; for rules that
read q, the drafter's as well), and a T5 1.1 XL decoder scoring the same block (random weights; ONE of its 24 layers
is run and its time multiplied by 24, the output projection is run whole). Every figure is of a loop on device.

It also counts compiled programs over a sweep of 20 alphas, 20 temperatures and 20 values of top-p, and looks
for vocabulary sorts outside the branch that only top-k or top-p enter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads; name another platform to measure it

import jax
import jax.numpy as jnp
import machine
import numpy as np
from jax.extend.core import jaxprs_in_params

from speccascade_t5x import trees
from speccascade_t5x.core import probs, rules, verify
from speccascade_t5x.decoding import DecodeConfig, Program, Sampling, State, loop
from speccascade_t5x.decoding.rounds import Speculative
from speccascade_t5x.interfaces import Array, Bound, Proposal, PyTree
from speccascade_t5x.models import T5, T5Config
from speccascade_t5x.models.t5 import param_shapes

BATCH, DRAFT_LEN = 8, 5
RULES = {"lossless": None, "chow": 0.5, "opt": 0.2, "token_v3": 0.3, "min_p": 0.9, "lossy_sd": 0.3}
SWEEP = 20
XL_LAYERS = 24
XL_LAYER = T5Config(
    vocab_size=128, emb_dim=2048, num_heads=32, num_encoder_layers=1, num_decoder_layers=1,
    head_dim=64, mlp_dim=5120, mlp_activations=("gelu", "linear"),
)  # fmt: skip


def fresh(stored: PyTree, round_index: Array) -> PyTree:
    """`stored`, as if computed anew in this round: or the compiler would move work on it out of the loop."""
    return jax.lax.optimization_barrier((stored, round_index))[0]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StoredVerifier:
    """A LanguageModel whose block logits are its parameters."""

    vocab_size: int

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        return {}

    def first(self, inputs: PyTree) -> tuple[Array, Array]:
        return jnp.zeros(BATCH, jnp.int32), jnp.zeros(BATCH, jnp.int32)

    def extend(self, params: Array, cache: PyTree, tokens: Array, positions: Array) -> tuple[Array, PyTree]:
        return fresh(params, positions), cache


@dataclasses.dataclass(frozen=True)
class StoredDrafter:
    """A Drafter whose draft is in its parameters; as `ModelDrafter`, it makes q of its logits if that is read."""

    sampling: Sampling
    reads: bool
    width: int
    draft_len: int = DRAFT_LEN
    noise_size: int = DRAFT_LEN * probs.DRAW

    def start(self, params: PyTree, inputs: PyTree, batch_size: int, room: int) -> PyTree:
        return {}

    def propose(
        self, params: PyTree, state: PyTree, tokens: Array, positions: Array, noise: Array
    ) -> tuple[Proposal, PyTree]:
        stored, logits = params
        stored, logits = fresh((stored, logits), positions)
        if self.reads:
            q_raw = probs.raw(logits)
            q = probs.tempered(logits, self.sampling.temperature, law_raw=q_raw)
            stored = dataclasses.replace(stored, q=q, q_raw=q_raw)
        return stored, state

    def commit(self, state: PyTree, lengths: Array) -> PyTree:
        return state


trees.register(StoredDrafter, static=["reads", "width", "draft_len", "noise_size"])


def models(vocab: int) -> tuple[Array, Array, Proposal]:
    """(drafter's logits, verifier's logits, a draft sampled from the drafter): peaked and often in agreement."""
    rng = np.random.default_rng(0)
    shape = (BATCH, DRAFT_LEN + 1, vocab)
    q = 3.0 * rng.standard_normal(shape, np.float32)
    p = q + 0.7 * rng.standard_normal(shape, np.float32)
    law = probs.raw(jnp.asarray(q[:, :-1]))
    draft = probs.sample(law, jnp.asarray(rng.random((BATCH, DRAFT_LEN, probs.DRAW), np.float32)))
    full = jnp.full(BATCH, DRAFT_LEN)
    return jnp.asarray(q), jnp.asarray(p), Proposal(draft, full, law, None, None, full)


def program_of(
    scored: tuple[Array, Array, Proposal], name: str, verification: str, sampling: Sampling, alpha: Any = None
) -> Program:
    """Speculative execution of a rule on stored logits."""
    q, p, draft = scored
    alpha = RULES[name] if alpha is None else alpha
    rule = rules.by_name(name, alpha)
    width = p.shape[-1]
    sampling = jax.tree.map(jnp.asarray, sampling)
    drafter = Bound(StoredDrafter(sampling, rule.reads_drafter, width), (draft, q))
    config = DecodeConfig(max_len=1024, draft_len=DRAFT_LEN, eos_id=0, verification=verification)
    return Program(Bound(StoredVerifier(width), p), rule, sampling, drafter, Speculative(), config, width)


def state_of(program: Program) -> State:
    """The state before the first round."""
    return loop.init(program, {"rows": jnp.zeros(BATCH)}, jax.random.key(0), jnp.arange(BATCH))


def round_seconds(rounds: Callable[..., State], program: Program, count: int) -> Callable[[], float]:
    """A function that times one round, from a loop of `count`."""
    state = state_of(program)

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(rounds(program, state, count))
        return (time.perf_counter() - begin) / count

    return measure


def judge_seconds(program: Program, count: int) -> Callable[[], float]:
    """Times rule and verification on stored distributions: the target, deferral, verification, pi of the tokens."""
    rule, temperature = program.rule, program.sampling.temperature
    draft, q_logits = program.drafter.params
    laws = [
        [f(x) for x in (q_logits, program.verifier.params)]
        for f in (probs.raw, lambda x: probs.tempered(x, temperature))
    ]
    plain = bool(temperature == 1.0)
    noise = jax.random.uniform(jax.random.key(2), (BATCH, DRAFT_LEN + probs.DRAW))
    verify_draft = verify.BY_NAME[program.config.verification]

    @jax.jit
    def judge(rule: rules.Rule, laws: Any, draft: Proposal, count: Array) -> Any:
        def body(i: Array, carry: Any) -> Any:
            (q_raw, p_raw), tempered = fresh(laws, i)
            q, p = (q_raw, p_raw) if plain else tempered
            raw_pair = rules.Pair(q=q_raw, p=p_raw, q_raw=q_raw, p_raw=p_raw)
            pair = rules.Pair(q=q, p=p, q_raw=q_raw, p_raw=p_raw, greedy=temperature == 0.0)
            target = rule.target(pair)
            outcome = verify_draft(
                draft.tokens, draft.lengths, draft.law, target, noise[:, :DRAFT_LEN], noise[:, DRAFT_LEN:]
            )
            tokens = jnp.concatenate([draft.tokens, outcome.token[:, None]], axis=1)
            return outcome, rule.deferral(pair), rule.target_at(raw_pair, tokens)

        return jax.lax.fori_loop(0, count, body, body(0, None))

    laws, draft = jax.device_put((laws, draft))

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(judge(rule, laws, draft, count))
        return (time.perf_counter() - begin) / (count + 1)

    return measure


def rounds_function() -> Callable[..., State]:
    """A jitted loop of rounds, with a cache of compiled programs of its own."""

    def rounds(program: Program, state: State, count: Array) -> State:
        return jax.lax.fori_loop(0, count, lambda _, s: program.execution.round(program, s), state)

    return jax.jit(rounds)


def softmax_seconds(arrays: list[Array], count: int) -> Callable[[], float]:
    """Times one softmax over each of `arrays`, results stored."""

    @jax.jit
    def softmaxes(arrays: list[Array], count: Array) -> list[Array]:
        def body(i: Array, previous: list[Array]) -> list[Array]:
            return [jax.nn.softmax(x, axis=-1) for x in fresh(arrays, i)]

        return jax.lax.fori_loop(0, count, body, arrays)

    def measure() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(softmaxes(arrays, count))
        return (time.perf_counter() - begin) / count

    return measure


def xl_seconds(vocab: int, count: int = 1) -> dict[str, Callable[[], float]]:
    """Times one decoder layer of T5 1.1 XL on a block, and its output projection."""
    model, key = T5(XL_LAYER), iter(jax.random.split(jax.random.key(1), 100))
    # Only the decoder is needed; the encoder's output enters through a cache of the right shape.
    shapes = param_shapes(XL_LAYER)
    inputs = {"encoder_input_tokens": jnp.ones((BATCH, 64), jnp.int32)}
    cache = jax.eval_shape(lambda params: model.start(params, inputs, BATCH, 64), shapes)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    params = {
        part: jax.tree.map(lambda x: 0.02 * jax.random.normal(next(key), x.shape), shapes[part])
        for part in ("decoder", "token_embedder")
    }
    kernel = 0.02 * jax.random.normal(next(key), (XL_LAYER.emb_dim, vocab))
    tokens = jnp.ones((BATCH, DRAFT_LEN + 1), jnp.int32)
    hidden = jax.random.normal(next(key), (BATCH, DRAFT_LEN + 1, XL_LAYER.emb_dim))
    layer = jax.jit(lambda params, cache: model.extend(params, cache, tokens, jnp.full(BATCH, 30)))
    project = jax.jit(jnp.dot)

    def timed(call: Callable[..., Any], *args: Any) -> Callable[[], float]:
        def measure() -> float:
            begin = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(call(*args))
            return (time.perf_counter() - begin) / count

        return measure

    return {"xl layer": timed(layer, params, cache), "xl projection": timed(project, hidden, kernel)}


def verification_arms(options: argparse.Namespace) -> dict[str, Any]:
    """Every rule, verification and temperature against its softmaxes and against the XL block."""
    scored = models(options.vocab)
    q, p, _ = scored
    rounds = rounds_function()
    tasks: dict[Any, Callable[[], float]] = {
        "softmax p": softmax_seconds([p], options.rounds),
        "softmax q, p": softmax_seconds([q, p], options.rounds),
    }
    cells = [(n, how, t) for t in options.temperatures for n in RULES for how in ("token", "block")]
    for name, how, temperature in cells:
        program = program_of(scored, name, how, Sampling(temperature=temperature))
        tasks[name, how, temperature] = round_seconds(rounds, program, options.rounds)
        tasks["judge", name, how, temperature] = judge_seconds(program, options.rounds)
    cut = program_of(scored, "token_v3", "token", Sampling(top_p=0.9))
    tasks["top-p"] = round_seconds(rounds, cut, options.rounds)
    found = machine.interleave(tasks, options.repeats)
    xl = {name: machine.spread(v)[0] for name, v in machine.interleave(xl_seconds(options.vocab), 3).items()}
    block = XL_LAYERS * xl["xl layer"] + xl["xl projection"]
    print(f"One softmax over p {_ms(found['softmax p'])}, over q and p {_ms(found['softmax q, p'])}")
    print(f"T5 1.1 XL block: {XL_LAYERS} x {xl['xl layer']:.3f} s (one layer, measured) + projection "
          f"{xl['xl projection']:.3f} s = {block:.2f} s\n")  # fmt: skip
    print("                          whole round                                    rule + verify          round, % of")
    print(
        "  T    rule      verify | ms (spread)              | softmaxes (spread)  | softmaxes (spread)  | an XL block"
    )
    rows = [_row(cell, found, block) for cell in cells]
    for what, key in (("rule + verify", "judge_ratio"), ("the whole round", "ratio")):
        within = sum(r[key] <= 3 for r in rows)
        print(f"  {what}: {within} of {len(rows)} within 3 softmaxes, the largest {max(r[key] for r in rows):.2f}")
    print(f"  the largest share of an XL block is {100 * max(r['share'] for r in rows):.2f} %")
    print(f"  token_v3, token, T 1, with top-p 0.9 (sorts): {_ms(found['top-p'])}\n")
    return {"rows": rows, "xl_block_s": block, "top_p_s": machine.spread(found["top-p"])[0]}


def _ms(values: list[float]) -> str:
    median, low, high = (1e3 * x for x in machine.spread(values))
    return f"{median:.2f} ms ({low:.2f} to {high:.2f})"


def _row(cell: tuple[str, str, float], found: dict[Any, list[float]], block: float) -> dict[str, Any]:
    name, how, temperature = cell
    base = found["softmax q, p" if rules.get(name).reads_drafter else "softmax p"]
    ratios = {
        key: machine.spread([a / b for a, b in zip(found[arm], base, strict=True)])
        for key, arm in (("ratio", cell), ("judge_ratio", ("judge", *cell)))
    }
    seconds = machine.spread(found[cell])[0]
    shown = [f"{median:.2f} ({low:.2f} to {high:.2f})" for median, low, high in ratios.values()]
    print(f"  {temperature:<4g} {name:<9} {how:<6} | {_ms(found[cell]):<24} | {shown[0]:<19} | {shown[1]:<19} | "
          f"{100 * seconds / block:.2f}")  # fmt: skip
    medians = {key: values[0] for key, values in ratios.items()}
    return {"rule": name, "verification": how, "temperature": temperature, "seconds": seconds, **medians,
            "ratio_low": ratios["ratio"][1], "ratio_high": ratios["ratio"][2], "share": seconds / block}  # fmt: skip


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Compiled programs over a sweep of traced options, and where sorts stand in them."""
    scored = models(256)  # how often a program compiles does not depend on the vocabulary
    compiled, outside = {}, {}
    for name in RULES:
        rounds = rounds_function()
        for i in range(SWEEP):
            part = i / (SWEEP - 1)
            sampling = Sampling(temperature=1.5 * part, top_p=1.0 - 0.9 * part)
            alpha = None if RULES[name] is None else part
            program = program_of(scored, name, "token", sampling, alpha)
            jax.block_until_ready(rounds(program, state_of(program), 1))
        compiled[name] = rounds._cache_size()
        found = list(sorts(jax.make_jaxpr(rounds)(program, state_of(program), 1).jaxpr))
        outside[name] = (sum(not inside for inside in found), len(found))
    print(f"{SWEEP} alphas, temperatures and values of top-p: compiled programs by rule {compiled}")
    print("vocabulary sorts outside a branch, of all: " + ", ".join(f"{n} {a} of {b}" for n, (a, b) in outside.items()))
    return {"compiled": compiled, "sorts_outside_branches": outside}


def sorts(jaxpr: Any, inside: bool = False) -> Iterator[bool]:
    """For every sort in a program, whether it stands inside a branch."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sort":
            yield inside
        for inner in jaxprs_in_params(equation.params):
            yield from sorts(inner, inside or equation.primitive.name == "cond")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="measured loops per arm")
    parser.add_argument("--rounds", type=int, default=12, help="rounds per loop")
    parser.add_argument("--vocab", type=int, default=32128, help="V")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.7, 0.0])
    parser.add_argument("--output", help="write the figures as JSON")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine.name(), "load_before": machine.load_average()}
    print(f"{figures['machine']}; load average {figures['load_before']:.2f}\n")
    figures |= verification_arms(options)
    figures["sweep"] = sweep(options)
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
