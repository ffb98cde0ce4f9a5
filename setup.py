"""Packaging: the top-level folders `tasks/` and `gin_configs/` travel inside the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
NAME = "speccascade_t5x"
PROJECT_URL = "https://example.org/speccascade_t5x"  # a placeholder: the one place to name the public repository
# Folders of the checkout that install as packages below NAME.
INSIDE = ("tasks", "gin_configs")

# The library itself (everything but the data and cli edges) works with these alone. A machine that
# trains and decodes from cached shards can install them and then this package with `--no-deps`.
LIBRARY = [
    "absl-py>=2.1,<3",
    "etils>=1.12,<2",
    "flax>=0.12,<0.13",
    "jax>=0.10,<0.12",
    "msgpack>=1.0,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "scipy>=1.14,<2",
    "tensorstore>=0.1.80,<0.2",
]
# What the data and cli edges add; seqio brings TensorFlow.
EDGES = [
    "clu>=0.0.12,<0.1",
    "gin-config>=0.5,<0.6",
    "importlib_resources>=6.4,<8",  # tensorflow-datasets needs it to prepare a dataset and does not say so
    "matplotlib>=3.10,<4",
    "rich>=13.7,<16",
    "rouge-score>=0.1.2,<0.2",
    "sacrebleu>=2.4,<3",
    "sentencepiece>=0.2,<0.3",
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.19,<3",  # clu writes its files and does not ask for it
    "tensorflow>=2.20,<2.22",
    "tensorflow-datasets>=4.9.9,<5",
]
TEST = [
    "build>=1.2,<2",
    "chex>=0.1.91,<0.2",
    "hypothesis>=6.100,<7",
    "mypy>=2.4,<3",
    "pdoc>=15,<17",  # the API reference
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "ruff>=0.12,<0.18",
    "safetensors>=0.5,<1",  # the reference for our own reader
    # The packaging test builds without isolation, so that it needs no network.
    "setuptools>=64",
    "wheel>=0.43,<1",
]
TPU = ["jax[tpu]>=0.10,<0.12"]


def packages() -> list[str]:
    """Every package, the folders of INSIDE under their installed names."""
    found = find_packages(include=[NAME, f"{NAME}.*"])
    for folder in INSIDE:
        found.append(f"{NAME}.{folder}")
        found += [f"{NAME}.{folder}.{inner}" for inner in find_packages(folder)]
    return found


def files_below(folder: str, *patterns: str) -> list[str]:
    """Files below `folder` as paths relative to it. Hidden files count: a bundle may hold some."""
    root = ROOT / folder
    found = {path for pattern in patterns for path in root.rglob(pattern) if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in found)


def version() -> str:
    """`__version__` as the package states it, read without importing the package."""
    text = (ROOT / NAME / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]


readme = ROOT / "README.md"

setup(
    name=NAME,
    version=version(),
    description="Speculative decoding and speculative cascades for T5X models in JAX.",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    url=PROJECT_URL,
    project_urls={
        "Source": PROJECT_URL,
        "Documentation": f"{PROJECT_URL}/blob/main/docs/index.md",
        "Changelog": f"{PROJECT_URL}/blob/main/CHANGELOG.md",
        "Issues": f"{PROJECT_URL}/issues",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={f"{NAME}.{folder}": folder for folder in INSIDE},
    package_data={
        NAME: ["py.typed"] + [f"pretrained/{file}" for file in files_below(f"{NAME}/pretrained", "*")],
        f"{NAME}.gin_configs": files_below("gin_configs", "*.gin"),
        f"{NAME}.tasks": files_below("tasks", "*.txt", "*.tsv", "*.tsv.gz", "*.jsonl"),
    },
    zip_safe=False,
    install_requires=LIBRARY + EDGES,
    extras_require={"test": TEST, "tpu": TPU},
    entry_points={"console_scripts": [f"speccascade = {NAME}.cli.__main__:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
