"""What the package is and needs. Exact versions that resolve together: requirements.lock."""

from setuptools import find_packages, setup

CORE = [
    "megatron-core==0.16.1",
    "torch>=2.6",
    "numpy>=2",
    "numba==0.68.1",  # compiles the loops over documents and samples; 0.2 GB, most of it LLVM
    # Encodes several times faster than each tokenizer's library; wheels for Linux (glibc), macOS
    # and Windows. Where there is none, the libraries do its work and give the same ids.
    "gigatoken==0.10.0; platform_machine in 'x86_64 AMD64 aarch64 arm64 ARM64'",
    "hydra-core>=1.3.2,<1.4",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "safetensors>=0.5",
    "protobuf>=5",  # reads and writes SentencePiece models
    "tqdm>=4.66",
    "psutil>=6",  # megatron-core's checkpoint writer hangs without it, and does not declare it
]

EXTRAS = {
    # Compiled against the installed torch: docs/install.md has the recipe that works.
    "te": ["transformer-engine[core-cu13,pytorch]==2.20.2"],
    "flash": ["flash-attn-4==4.0.0b36; platform_system=='Linux'"],  # JIT, Hopper and Blackwell
    "vl": ["pillow>=11", "nvidia-dali-cuda130>=2.4; platform_system=='Linux'"],
    "curate": ["tokenizers>=0.21", "tiktoken>=0.9"],
    "eval": ["transformers>=5.0,<6", "matplotlib>=3.9", "tokenizers>=0.21", "tiktoken>=0.9"],
    "wandb": ["wandb>=0.19"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6",
        "ruff>=0.9",
        "mypy>=1.14",
        "gguf>=0.10",
        "accelerate>=1.0",
    ],
}

setup(
    name="megatron_ext",
    version="0.1.0",
    description="Thin extensions to Megatron-Core for training bilingual language models",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_ext*", "launch*", "tools*"]),
    package_data={"megatron_ext.data.corpus": ["shipped/*.jsonl"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
