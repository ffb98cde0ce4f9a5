# %% [markdown]
# # A rule of your own against TokenV3
#
# A rule is one method: from the drafter's distribution q and the verifier's distribution p it computes the target
# distribution pi. Drafting, verification and the loop follow from pi. This example defines a rule, checks that its
# output really follows pi, and compares it with TokenV3 in a small sweep on the packaged pair.

# %%
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

import speccascade_t5x
from speccascade_t5x import decoding, models
from speccascade_t5x.core import rules
from speccascade_t5x.tasks.folding import fold

TINY = os.environ.get("SPECCASCADE_EXAMPLE_TINY") == "1"  # a quick run, as the tests do it

# %% [markdown]
# ## The rule
#
# TokenV3 keeps the drafter's tokens that the verifier finds likely enough. `Sober` excludes those of which the drafter
# is surer than the verifier by more than a factor alpha. Its base class gives the mass of the excluded tokens to p.


# %%
class Sober(rules.TokenRule):
    """Exclude a token that the drafter finds more than alpha times as likely as the verifier."""

    alpha_range = (1.0, math.inf)
    ends = "1 keeps only what the verifier finds at least as likely, plus infinity is the drafter alone"
    source = "this example"

    def rejects(self, pair):
        return pair.q_raw > self._alpha(pair.q_raw.ndim) * pair.p_raw


rules.register("sober", Sober)

# %%
p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.5, 0.3])
at_a_position = rules.Pair(q=q, p=p, q_raw=q, p_raw=p)
for alpha in (1.0, 1.6, 2.0):
    print(f"alpha {alpha}: pi =", np.round(Sober(alpha=alpha).target(at_a_position), 3))

# %% [markdown]
# ## Its output follows pi
#
# Two bigram tables over four tokens are small enough to write pi down. The loop decodes one token for 20,000 rows at
# once, and the frequencies of the first token agree with pi.

# %%
ROWS = 20_000
tables = [jax.random.normal(jax.random.key(i), (4, 4)) for i in range(2)]
drafter, verifier = models.bigram(tables[0]), models.bigram(tables[1])
output = decoding.speculative(
    drafter=drafter,
    verifier=verifier,
    rule=Sober(alpha=1.5),
    inputs={"rows": jnp.zeros((ROWS, 1), jnp.int32)},
    config=decoding.DecodeConfig(max_len=1, draft_len=1, eos_id=3),
    key=jax.random.key(2),
    example_ids=jnp.arange(ROWS),
)
first_q, first_p = (jax.nn.softmax(table[0]) for table in tables)
expected = Sober(alpha=1.5).target(rules.Pair(q=first_q, p=first_p, q_raw=first_q, p_raw=first_p))
seen = np.bincount(np.asarray(output.tokens[:, 0]), minlength=4) / ROWS
print("pi        ", np.round(expected, 3))
print("frequency ", np.round(seen, 3))
assert np.abs(seen - np.asarray(expected)).max() < 0.02  # more than five standard deviations

# %% [markdown]
# ## A small sweep
#
# Both rules at several alphas, with MinP, which keeps the tokens of TokenV3 and ignores the drafter. Quality is the
# share of letters that are right. A sample this small shows how to measure; it shows nothing about the rules.
# `speccascade sweep` measures properly, with intervals and baselines.

# %%
REFERENCES = [
    "Die Fähre kam nie wieder, aber ihr Horn hört man noch heute.",
    "Drei Türme hüten das Tal, doch nur einer ist bewohnt.",
    "Möchten Sie die Insel wirklich ohne Schiff verlassen?",
    "Menü schließen und Größe übernehmen",
][: 2 if TINY else 4]
SETTINGS = {"token_v3": (0.1, 0.5, 0.9), "min_p": (0.1, 0.5, 0.9), "sober": (1.0, 2.0, 8.0)}
if TINY:
    SETTINGS = {"token_v3": (0.5,), "sober": (2.0,)}
SEEDS = range(1 if TINY else 8)

pair = speccascade_t5x.load("restore_de_pair")
texts = [fold(reference) for reference in REFERENCES]


def accuracy(prediction, reference):
    """The share of the reference's letters that stand at their place in the prediction."""
    return sum(a == b for a, b in zip(prediction, reference, strict=False)) / len(reference)


print(f"{'rule':10} {'alpha':>5} {'accuracy':>9} {'accepted':>9} {'verifier calls per token':>25}")
for rule, alphas in SETTINGS.items():
    for alpha in alphas:
        records = [r for seed in SEEDS for r in pair.generate(texts, rule=rule, alpha=alpha, draft_len=5, seed=seed)]
        right = np.mean([accuracy(r["prediction"], REFERENCES[i % len(texts)]) for i, r in enumerate(records)])
        total = {name: sum(r["counts"][name] for r in records) for name in records[0]["counts"]}
        accepted, calls = total["accepted"] / total["examined"], total["verifier_calls"] / total["committed"]
        print(f"{rule:10} {alpha:5.1f} {right:9.1%} {accepted:9.1%} {calls:25.2f}")
