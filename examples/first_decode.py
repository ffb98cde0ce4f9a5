# %% [markdown]
# # A first decode, and who wrote what
#
# The packaged pair restores capitals, umlauts and sharp s in German text. A small drafter writes a few bytes ahead, a
# larger verifier checks them in one call. Run this file as a script, or open it as a notebook (jupytext).

# %%
import time

import speccascade_t5x
from speccascade_t5x import interfaces

pair = speccascade_t5x.load("restore_de_pair")
texts = [
    "die fahre kam nie wieder, aber ihr horn hort man noch heute.",
    "drei turme huten das tal, doch nur einer ist bewohnt.",
    "mochten sie die insel wirklich ohne schiff verlassen?",
]

# %% [markdown]
# ## One verifier call per token, or one per block
#
# At temperature 0 lossless speculation writes exactly what the verifier writes alone, with fewer verifier calls.

# %%
alone = pair.generate(texts, method="verifier", temperature=0.0)
speculative = pair.generate(texts, method="speculative", rule="lossless", draft_len=5, temperature=0.0)
for one, other in zip(alone, speculative, strict=True):
    print(one["prediction"])
    print(f"  verifier calls: {one['counts']['verifier_calls']} alone, {other['counts']['verifier_calls']} speculative")
    assert one["tokens"] == other["tokens"]

# %% [markdown]
# ## Who wrote each token
#
# `source` says for every token whether it is an accepted draft, was drawn from the residual after a rejection, or is
# the bonus token after a wholly accepted draft. A token of this pair is a byte; a letter of several bytes is shown at
# its last one.

# %%
MARKS = {
    interfaces.SOURCE_ACCEPTED: "{}",
    interfaces.SOURCE_RESIDUAL: "[{}]",
    interfaces.SOURCE_BONUS: "<{}>",
}


def marked(record):
    """The prediction with residual tokens in [ ] and bonus tokens in < >."""
    pieces = pair.vocabulary.decode_pieces(record["tokens"])
    return "".join(
        MARKS[source].format(piece) if piece else "" for piece, source in zip(pieces, record["source"], strict=True)
    )


for record in speculative:
    print(marked(record))

# %% [markdown]
# ## A cascade instead of a copy of the verifier
#
# Under the rule TokenV3 the drafter's token is kept wherever the verifier gives it at least 1 - alpha times its highest
# probability. The output no longer follows the verifier alone.

# %%
for alpha in (0.3, 0.9):
    records = pair.generate(texts, rule="token_v3", alpha=alpha, temperature=1.0, seed=1)
    print(f"TokenV3, alpha {alpha}")
    for record in records:
        print(" ", marked(record))

# %% [markdown]
# ## What it costs
#
# Every shape is compiled once, in the calls above; the times below are of decoding.

# %%
for method in ("verifier", "speculative"):
    begin = time.perf_counter()
    records = pair.generate(texts, method=method, temperature=0.0, draft_len=None if method == "verifier" else 5)
    seconds = time.perf_counter() - begin
    print(f"{method}: {sum(len(record['tokens']) for record in records) / seconds:.0f} tokens/s")
