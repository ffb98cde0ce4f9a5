# %% [markdown]
# # Distil a drafter and see the speed-up
#
# A drafter that agrees with its verifier makes speculation fast. Here a small model is trained from scratch on what the
# packaged verifier writes, and learns the verifier's distribution at every position as well. About two minutes on a
# laptop; a real run takes a corpus and `speccascade train` (docs/training.md).

# %%
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import speccascade_t5x
from speccascade_t5x import checkpoints
from speccascade_t5x.data import packing, shards
from speccascade_t5x.inference import Settings
from speccascade_t5x.tasks.folding import fold
from speccascade_t5x.training import losses, optimizers, train_loop

TINY = os.environ.get("SPECCASCADE_EXAMPLE_TINY") == "1"  # a quick run, as the tests do it
TEXTS, STEPS = (16, 3) if TINY else (300, 300)

# %% [markdown]
# ## Data: the verifier's own outputs
#
# Sentences are put together from a few parts, folded to lower-case ASCII, and restored by the verifier.

# %%
STARTS = ["Die Fähre", "Der Müller", "Unsere Brücke", "Das Gebäude", "Ein Schlüssel", "Die Königin", "Der alte Bär"]
MIDDLES = ["gehört", "fährt", "führt", "schließt", "öffnet", "zählt", "hört", "grüßt"]
ENDS = ["zum Fluss.", "die Tür.", "für alle Gäste.", "über die Straße.", "am frühen Abend.", "nach Österreich."]
chosen = random.Random(0)
sentences = [" ".join(map(chosen.choice, (STARTS, MIDDLES, ENDS))) for _ in range(TEXTS + 8)]
texts = [fold(sentence) for sentence in sentences]
held_out, training = texts[:8], [text for text in texts[8:] if text not in texts[:8]]

pair = speccascade_t5x.load("restore_de_pair")
outputs = pair.generate(training, method="verifier", temperature=0.0, batch_size=8)
vocabulary = pair.vocabulary
examples = (
    (np.array([*vocabulary.encode(output["inputs"]), vocabulary.eos_id]), np.array(output["tokens"]))
    for output in outputs
)
corpus = shards.from_examples(examples, vocabulary)
batches = packing.Packed(corpus, batch_size=8, inputs_len=128, targets_len=128)
print(f"{len(corpus)} examples, {batches.steps_per_epoch} batches an epoch")

# %% [markdown]
# ## Training
#
# The drafter has the size of the packaged one, and fresh parameters. The loss is 0.9 forward KL to the verifier's
# distribution and 0.1 cross entropy.

# %%
config = train_loop.TrainConfig(
    steps=STEPS,
    optimizer=optimizers.AdamW(optimizers.Schedule("cosine", base=0.003, warmup_steps=min(20, STEPS // 2))),
    loss=losses.LossConfig(normalizer="real_tokens"),
    distill=losses.DistillConfig(divergence="forward_kl", weight=0.9),
    log_every=max(STEPS // 8, 1),
)


class Printer(train_loop.Observer):
    """Prints the loss as training goes on."""

    def logged(self, step, metrics):
        print(f"step {step}: loss {metrics['loss']:.3f}")


trained = train_loop.train_loop(
    pair.drafter.model.config, batches, config, teacher=pair.verifier, observer=Printer()
).bound

# %% [markdown]
# ## The new pair
#
# A bundle holds everything a decode needs. `speccascade infer --pair=FOLDER` reads it as well.

# %%
folder = Path(tempfile.mkdtemp()) / "distilled_pair"
checkpoints.save_bundle(
    folder,
    verifier=pair.verifier,
    drafter=trained,
    vocabulary=vocabulary,
    feature_lengths=pair.feature_lengths,
    description="The packaged verifier with a drafter distilled on a few sentence parts.",
)
distilled = speccascade_t5x.load(folder)

# %% [markdown]
# ## The speed-up
#
# The held-out texts are new combinations of the same parts. All outputs are those of the verifier; only the time
# differs. The first decode of every method compiles and is not counted. The packaged drafter has seen a whole corpus.

# %%
ARMS = {
    "verifier alone": (pair, {"method": "verifier"}),
    "distilled drafter": (distilled, {"draft_len": 5}),
    "packaged drafter": (pair, {"draft_len": 5}),
}
seconds, rates = {name: [] for name in ARMS}, {}
for _ in range(2 if TINY else 8):
    for name, (arm, settings) in ARMS.items():
        begin = time.perf_counter()
        found = arm.run(held_out, Settings(temperature=0.0, batch_size=1, **settings))
        seconds[name].append(time.perf_counter() - begin)
        if name == "verifier alone":
            expected = [record["prediction"] for record in found.records]
        assert [record["prediction"] for record in found.records] == expected
        rates[name] = found.rates
base = statistics.median(seconds["verifier alone"][1:])
for name, times in seconds.items():
    calls = rates[name]["verifier_calls_per_token"]
    print(f"{name}: {base / statistics.median(times[1:]):.2f}x, {calls:.2f} verifier calls per token")
