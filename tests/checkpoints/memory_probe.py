"""Run as a program: writes one model in every format and prints what loading each costs beyond the arrays themselves.

python memory_probe.py FOLDER VOCABULARY WIDTH LAYERS MLP FORMAT...
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path


def resident(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def make(folder: Path, form: str, sizes: list[int]) -> None:
    """Writes the model: 't5x', 'orbax', 'huggingface', 'bundle', or 't5x_orbax', which is one chunk a tensor."""
    import jax
    import numpy as np

    from speccascade_t5x.checkpoints import export, flat_params
    from speccascade_t5x.checkpoints.bundle import Bundle
    from speccascade_t5x.interfaces import Bound
    from speccascade_t5x.models.t5 import T5, T5Config, param_shapes
    from speccascade_t5x.text.vocabulary import ByteVocabulary

    vocab, width, layers, mlp = sizes
    config = T5Config(
        vocab_size=vocab,
        emb_dim=width,
        num_heads=2,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_dim=mlp,
        mlp_activations=("gelu", "linear"),
    )
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), param_shapes(config))
    folder.parent.mkdir(exist_ok=True, parents=True)
    if form == "t5x_orbax":
        import orbax.checkpoint as ocp

        item = {"target": params, "state": {"step": np.asarray(5, np.int32)}}
        with ocp.PyTreeCheckpointer(use_ocdbt=True) as writer:
            writer.save(folder / "state", item)
        return
    form, _, dtype = form.partition(":")
    job = export._Job(form, np.dtype(jax.numpy.dtype(dtype or "float32")), None, 4 * 10**9, verify=False)
    bound = Bound(T5(config), params)
    if form == "bundle":
        job.write_bundle(Bundle(folder, bound, None, ByteVocabulary(), {"inputs": 8, "targets": 8}, {}, ""), folder, "")
        return
    folder.mkdir()
    opened = type("Held", (), {"kind": "held", "vocabulary_file": None})
    getattr(job, f"_write_{form}")(folder, opened, bound, 0, [])
    assert len(flat_params.flatten(params)) > 10


def measure(folder: Path) -> dict:
    import jax

    from speccascade_t5x import checkpoints

    checkpoints.load(folder.parent / "tiny")  # so that code and pools are there
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    bound = checkpoints.load(folder)
    peak = resident("VmHWM")
    leaves = jax.tree.leaves(bound.params)
    arrays, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
    return {"arrays": arrays, "largest": largest, "over": peak - before - arrays}


def main() -> None:
    folder, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:6]]
    for form in sys.argv[6:]:
        place = folder / form.replace(":", "_")
        for name, shape in (("tiny", [384, 8, 1, 16]), ("large", sizes)):
            program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory_probe; "
            call = f"memory_probe.make(memory_probe.Path({str(place / name)!r}), {form!r}, {shape!r})"
            subprocess.run([sys.executable, "-c", program + call], check=True)
        program = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import memory_probe; "
        call = f"print(json.dumps(memory_probe.measure(memory_probe.Path({str(place / 'large')!r}))))"
        done = subprocess.run([sys.executable, "-c", program + call], check=True, capture_output=True, text=True)
        print(json.dumps({"format": form, **json.loads(done.stdout.splitlines()[-1])}), flush=True)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
