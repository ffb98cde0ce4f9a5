"""How fast a decode is, where its time goes, and whether speculation gains what the cost model says.

    python benchmarks/decode.py [--repeats 5] [--output decode.json]

Three parts, each in one process with its arms interleaved in time and warm-up excluded:

1. Autoregression of a random model of T5-small's size (1.1: 8 layers, D 512, V 32,128; float32), batch 1,
   as a share of the bound "weights a step must read / measured memory bandwidth"; and the same model as
   verifier of a tiny random drafter, whose drafts are all rejected: what a round costs where weights do not fit
   the caches.
2. The packaged pair at batch 1 and 8, temperature 0, lossless: tokens/s per draft length (whole decodes,
   encoders included), where the time goes, compile time, memory.
3. The decoding loop of the same runs against (tokens per round) / (n_d c + v), the cost model of speculative
   decoding, with the drafter's step, its first two-token block and the verifier's step and block timed alone in
   the same run. A decode also pays its encoders, the call of the loop and a first round on cold caches; the
   model knows nothing of these, so its gain is compared with that of the rounds after the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax loads; name another platform to measure it

import jax
import jax.numpy as jnp
import machine

import speccascade_t5x
from speccascade_t5x import decoding
from speccascade_t5x.common import paths
from speccascade_t5x.core import probs, rules
from speccascade_t5x.decoding.compiled import CompiledDecoder
from speccascade_t5x.interfaces import Bound
from speccascade_t5x.models import T5, T5Config, init_params
from speccascade_t5x.tasks.folding import fold

PROMPT_LEN, MAX_LEN = 80, 96
clock = time.perf_counter  # what times are told by
T5_SMALL = T5Config(
    vocab_size=32128, emb_dim=512, num_heads=6, num_encoder_layers=8, num_decoder_layers=8,
    head_dim=64, mlp_dim=1024, mlp_activations=("gelu", "linear"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds per arm")
    parser.add_argument("--sentences", type=int, default=24, help="sentences of the packaged demo per round")
    parser.add_argument("--output", help="write the figures as JSON")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine.name(), "load_before": machine.load_average()}
    print(f"{figures['machine']}; load average {figures['load_before']:.2f}\n")
    figures["autoregression"] = autoregression(options.repeats)
    figures["small"] = small_pair(options.repeats)
    figures["pair"] = [packaged_pair(batch, options) for batch in (1, 8)]
    figures["peak_memory_mb"] = machine.peak_memory() / 1e6
    print(f"\npeak resident memory of the whole run: {figures['peak_memory_mb']:.0f} MB")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def autoregression(repeats: int) -> dict[str, float]:
    """Part 1."""
    model = Bound(T5(T5_SMALL), init_params(T5_SMALL, jax.random.key(0)))
    # The encoder runs once; a step reads the decoder and the output projection.
    weights = sum(x.nbytes for x in jax.tree.leaves(model.params["decoder"]))
    step = step_seconds(model, batch=1, width=1)
    found = machine.interleave({"step": step, "bandwidth": lambda: 1 / machine.memory_bandwidth(repeats=1)}, repeats)
    seconds, low, high = machine.spread(found["step"])
    bandwidth = 1 / min(found["bandwidth"])
    share = weights / bandwidth / seconds
    print("Autoregression, T5-small size (random, float32), batch 1")
    print(f"  memory bandwidth {bandwidth / 1e9:.1f} GB/s, weights read per step {weights / 1e6:.0f} MB")
    print(f"  {1 / seconds:.0f} tokens/s ({1 / high:.0f} to {1 / low:.0f}): {100 * share:.0f} % of the bound\n")
    return {"tokens_per_s": 1 / seconds, "share_of_bound": share, "bandwidth": bandwidth, "weights": weights}


def step_seconds(bound: Bound, batch: int, width: int, steps: int = 64) -> Callable[[], float]:
    """A function that returns the seconds of one `extend` of `width` tokens, from a loop of `steps` on device.

    As the engine runs it: a while loop with a traced bound over donated state.
    """
    model, room = bound.model, MAX_LEN + 16
    inputs = {"encoder_input_tokens": jnp.full((batch, PROMPT_LEN), 5, jnp.int32)}
    start = jax.jit(lambda params: model.start(params, inputs, batch, room))

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(params: Any, cache: Any, steps: jax.Array) -> Any:
        def body(carry: Any) -> Any:
            i, tokens, cache = carry
            logits, cache = model.extend(params, cache, tokens, jnp.full(batch, i))
            return i + 1, probs.argmax(logits), cache

        first = (jnp.int32(0), jnp.ones((batch, width), jnp.int32), cache)
        return jax.lax.while_loop(lambda carry: carry[0] < steps, body, first)

    def measure() -> float:
        cache = jax.block_until_ready(start(bound.params))
        begin = clock()
        jax.block_until_ready(loop(bound.params, cache, jnp.int32(steps)))
        return (clock() - begin) / steps

    return measure


class Arm:
    """One way to decode the sentences: compiled once, then timed as often as asked.

    Attributes:
      loop_seconds: wall time of the loop alone, one figure per call of `seconds`.
      first_seconds: the same of a loop stopped after its first round: the call, and cold caches.
      rounds: rounds the loop ran over all batches; a batch runs as many as its slowest row.
      committed, row_rounds: tokens and per-row rounds, summed.
    """

    def __init__(self, program: decoding.Program, batches: list[dict[str, jax.Array]]):
        self.program, self.batches = program, batches
        self.compiled = CompiledDecoder(program, batches[0])
        self.loop_seconds: list[float] = []
        self.first_seconds: list[float] = []
        self.rounds = self.committed = self.row_rounds = 0

    def seconds(self) -> float:
        """Decodes all batches; returns the wall time of it, results ready."""
        outputs, whole, loop, first = [], 0.0, 0.0, 0.0
        for i, batch in enumerate(self.batches):
            ids = jnp.arange(len(batch["encoder_input_tokens"]), dtype=jnp.int32) + 1000 * i
            begin = clock()
            state = jax.block_until_ready(self.compiled.start(self.program, batch, jax.random.key(0), ids))
            started = clock()
            state = jax.block_until_ready(self.compiled.run(self.program, state))
            loop += clock() - started
            outputs.append(jax.block_until_ready(self.compiled.finish(state)))
            whole += clock() - begin
            state = jax.block_until_ready(self.compiled.start(self.program, batch, jax.random.key(0), ids))
            started = clock()
            jax.block_until_ready(self.compiled.run(self.program, state, 1))
            first += clock() - started
        counts = [jax.device_get(output.counts) for output in outputs]
        self.rounds = sum(int(c.rounds.max()) for c in counts)
        self.row_rounds = sum(int(c.rounds.sum()) for c in counts)
        self.committed = sum(int(c.committed.sum()) for c in counts)
        self.loop_seconds.append(loop)
        self.first_seconds.append(first)
        return whole

    def steady_round(self) -> list[float]:
        """Seconds of one round after the first, one figure per call of `seconds` but the one that warmed up."""
        later = self.rounds - len(self.batches)
        return [(a - b) / later for a, b in zip(self.loop_seconds[1:], self.first_seconds[1:], strict=True)]


def packaged_pair(batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Parts 2 and 3 on the packaged pair at one batch size."""
    loaded = speccascade_t5x.load(paths.pretrained_dir() / "restore_de_pair")
    config = decoding.DecodeConfig(max_len=MAX_LEN, vocab_size=loaded.vocabulary.vocab_size)
    batches = prompts(loaded, batch, options.sentences)
    title = f"Packaged pair, lossless, temperature 0, batch {batch}, {options.sentences} sentences"
    return compare(title, loaded.drafter, loaded.verifier, batches, config, (3, 5, 7, 10), options.repeats)


def small_pair(repeats: int) -> dict[str, Any]:
    """A random verifier of T5-small's size and a tiny random drafter, batch 1."""
    tiny = dataclasses.replace(T5_SMALL, emb_dim=64, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
    models = [Bound(T5(c), init_params(c, jax.random.key(i))) for i, c in enumerate((tiny, T5_SMALL))]
    config = decoding.DecodeConfig(max_len=MAX_LEN)
    batches = [{"encoder_input_tokens": jnp.full((1, PROMPT_LEN), i, jnp.int32)} for i in (5, 6)]
    title = "T5-small size (random) with a tiny random drafter, lossless, temperature 0, batch 1"
    return compare(title, *models, batches, config, (5,), repeats)


def compare(
    title: str,
    drafter: Bound,
    verifier: Bound,
    batches: list[dict[str, jax.Array]],
    config: decoding.DecodeConfig,
    draft_lens: tuple[int, ...],
    repeats: int,
) -> dict[str, Any]:
    """Autoregression and lossless speculation of one pair, measured and predicted."""
    greedy = decoding.Sampling(temperature=jnp.float32(0.0))
    batch = len(batches[0]["encoder_input_tokens"])
    arms = {0: Arm(decoding.autoregressive_program(verifier, config, greedy), batches)}
    for draft_len in draft_lens:
        changed = dataclasses.replace(config, draft_len=draft_len)
        program = decoding.speculative_program(drafter, verifier, rules.Lossless(), changed, greedy)
        arms[draft_len] = Arm(program, batches)
    timers = {f"decode {g}": arm.seconds for g, arm in arms.items()}
    timers |= {f"verifier {g + 1}": step_seconds(verifier, batch, g + 1) for g in arms}
    timers |= {f"drafter {width}": step_seconds(drafter, batch, width) for width in (1, 2)}
    found = machine.interleave(timers, repeats)
    rows = [row(g, arms, found) for g in arms]
    median = {name: machine.spread(values)[0] for name, values in found.items()}
    step = median["verifier 1"]
    print(title)
    print("   G  tokens/s  speed-up (spread)    | rounds: gain (spread)   model  tokens/round | % of decode time:")
    print(" " * 37 + "|" + " " * 43 + "| encode entry draft verify rest")
    for r in rows:
        print(
            f"  {r['draft_len']:>2}  {r['tokens_per_s']:>8.0f}  {r['speed_up']:.2f} ({r['speed_up_low']:.2f} to "
            f"{r['speed_up_high']:.2f})  | {r['gain']:>6.2f} ({r['gain_low']:.2f} to {r['gain_high']:.2f})  "
            f"{r['predicted']:>6.2f}  {r['tokens_per_round']:>12.2f} | {r['encode_share']:>6.0f} "
            f"{r['entry_share']:>5.0f} {r['drafter_share']:>5.0f} {r['verifier_share']:>6.0f} {r['rest_share']:>4.0f}"
        )
    blocks = ", ".join(f"{g + 1}: {median[f'verifier {g + 1}'] / step:.2f}" for g in arms)
    print(f"  verifier step {step * 1e3:.3f} ms; a block of n tokens costs, in steps, {blocks}")
    print(f"  drafter step {median['drafter 1'] / step:.3f}, its two-token block {median['drafter 2'] / step:.3f}")
    compiles = ", ".join(f"{g}: {arm.compiled.seconds:.1f}" for g, arm in arms.items())
    memory = ", ".join(f"{g}: {arm.compiled.temporary_bytes() / 1e6:.2f}" for g, arm in arms.items())
    print(f"  compile seconds by draft_len {compiles}; temporary MB of the loop {memory}\n")
    return {"batch": batch, "rows": rows, "seconds": median}


def row(draft_len: int, arms: dict[int, Arm], found: dict[str, list[float]]) -> dict[str, float]:
    """Figures of one draft length: measured, predicted, and where the time of a decode goes."""
    arm, base = arms[draft_len], arms[0]
    whole, loop = found[f"decode {draft_len}"], arm.loop_seconds[1:]  # the first call warmed up
    seconds = machine.spread(whole)[0]
    tokens = arm.committed / base.committed
    speed_up = machine.spread([tokens * b / a for a, b in zip(whole, found["decode 0"], strict=True)])
    per_round = arm.committed / arm.rounds / (base.committed / base.rounds)
    gain = machine.spread([per_round * b / a for a, b in zip(arm.steady_round(), base.steady_round(), strict=True)])
    verifier = machine.spread(found[f"verifier {draft_len + 1}"])[0] * arm.rounds
    block, step = (machine.spread(found[f"drafter {width}"])[0] for width in (2, 1))
    drafter = (block + (draft_len - 1) * step) * arm.rounds if draft_len else 0.0
    alone = machine.spread(found["verifier 1"])[0] * base.rounds
    encode = seconds - machine.spread(loop)[0]
    first = machine.spread(arm.first_seconds[1:])[0] - machine.spread(arm.steady_round())[0] * len(arm.batches)
    return {
        "draft_len": draft_len,
        "tokens_per_s": arm.committed / seconds,
        **dict(zip(("speed_up", "speed_up_low", "speed_up_high"), speed_up, strict=True)),
        **dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True)),
        "predicted": tokens * alone / (drafter + verifier),
        "tokens_per_round": arm.committed / arm.row_rounds,
        "encode_share": 100 * encode / seconds,
        "drafter_share": 100 * drafter / seconds,
        "verifier_share": 100 * verifier / seconds,
        "entry_share": 100 * first / seconds,
        "rest_share": 100 * (1 - (encode + first + drafter + verifier) / seconds),
        "compile_s": arm.compiled.seconds,
    }


def prompts(loaded: Any, batch: int, sentences: int) -> list[dict[str, jax.Array]]:
    """The packaged demo sentences, folded, in batches of one shape."""
    lines = (paths.pretrained_dir() / "demo_de.tsv").read_text(encoding="utf-8").splitlines()
    texts = [fold(line.split("\t")[1]) for line in lines if line and not line.startswith("#")][:sentences]
    rows = [[*loaded.vocabulary.encode(text), loaded.vocabulary.eos_id] for text in texts]
    rows = rows[: len(rows) // batch * batch]
    padded = jnp.array([ids[:PROMPT_LEN] + [0] * (PROMPT_LEN - len(ids)) for ids in rows], jnp.int32)
    return [{"encoder_input_tokens": padded[i : i + batch]} for i in range(0, len(rows), batch)]


if __name__ == "__main__":
    main()
