"""A small model's logits, loss and gradients on this process's device, written to a file.

python -m tests.gpu.one_model make   FOLDER                     weights and reference, fp32
python -m tests.gpu.one_model read   FOLDER IMPL DTYPE OUT      the same weights elsewhere
python -m tests.gpu.one_model isolate IMPL BACKEND DTYPE        packed documents against alone
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import KernelsConfig, PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.train.config import PhaseConfig

STATE = {"step": 1, "tokens": 0, "phase": 0}
TOKENS = 96


def described(*, impl: str, dtype: str, backend: str = "auto") -> RunConfig:
    """GQA, Norm-Head, QKV bias and a vocabulary that needs padding, in four layers."""
    model = ModelConfig(
        family="index",
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=736,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=509,
        add_qkv_bias=True,
        norm_head=True,
    )
    return RunConfig(
        name="agreement",
        model=model,
        phases=[PhaseConfig(tokens=1)],
        precision=PrecisionConfig(dtype=dtype),
        kernels=KernelsConfig(transformer_impl=impl, attention_backend=backend),
    )


def build(run: RunConfig) -> tuple[Any, Any]:
    """The process groups and the one chunk of a single rank, on its device."""
    from megatron_ext.devices import device
    from megatron_ext.models.gpt import build_model
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env

    started = groups.start(run.parallel, Env.read({}), seed=1)
    chunk = build_model(run, started, wrap_ddp=False)[0]
    return started, chunk.to(device.current().torch_device())


def evaluate(run: RunConfig, chunk: Any) -> dict[str, Any]:
    """Logits, loss and every gradient for one fixed sequence, in fp32 on the CPU."""
    import torch

    place = next(chunk.parameters()).device
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, run.model.vocab_size, (1, TOKENS + 1), generator=generator).to(place)
    position = torch.arange(TOKENS, device=place)[None]
    chunk.train()
    loss = chunk(tokens[:, :-1], position, None, labels=tokens[:, 1:]).float().mean()
    loss.backward()
    chunk.eval()
    with torch.no_grad():
        logits = chunk(tokens[:, :-1], position, None)[..., : run.model.vocab_size]
    found = {"loss": loss.detach(), "logits": logits}
    found |= {f"grad.{stored(n)}": p.grad for n, p in chunk.named_parameters()}
    found["weight.output_layer.weight"] = chunk.output_layer.weight.detach()
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


def stored(name: str) -> str:
    """A parameter's name as Transformer Engine's fused layers call it."""
    from megatron_ext.models.local_spec import CHECKPOINT_KEYS

    for local, fused in CHECKPOINT_KEYS.items():
        name = name.replace(f".{local}", f".{fused}")
    return name


def make(folder: str) -> None:
    """Weights into a checkpoint, and what they give here."""
    from safetensors.torch import save_file

    from megatron_ext.checkpoint.save import save

    run = described(impl="local", dtype="fp32")
    groups, chunk = build(run)
    path = save(Path(folder), run=run, chunks=[chunk], optimizer=None, state=STATE, groups=groups)
    save_file(evaluate(run, chunk), Path(folder) / "reference.safetensors")
    print(path)


def read(checkpoint: str, impl: str, dtype: str, out: str) -> None:
    """What the weights of ``checkpoint`` give with these layers in this format."""
    from safetensors.torch import save_file

    from megatron_ext.checkpoint.load import load

    run = described(impl=impl, dtype=dtype)
    groups, chunk = build(run)
    load(Path(checkpoint), run=run, chunks=[chunk], optimizer=None, groups=groups)
    save_file(evaluate(run, chunk), out)
    print(out)


def isolate(impl: str, backend: str, dtype: str) -> None:
    """The largest difference that packing makes, as JSON."""
    from megatron_ext.models.isolation import prove_isolation

    run = described(impl=impl, dtype=dtype, backend=backend)
    _, chunk = build(run)
    print(json.dumps({"difference": prove_isolation([chunk])}))


if __name__ == "__main__":
    {"make": make, "read": read, "isolate": isolate}[sys.argv[1]](*sys.argv[2:])
