"""A small model's logits, loss and gradients on this process's device, written to a file.

python -m tests.gpu.one_model make   FOLDER                     weights and reference, fp32
python -m tests.gpu.one_model read   FOLDER IMPL DTYPE OUT      the same weights elsewhere
python -m tests.gpu.one_model isolate IMPL BACKEND DTYPE        packed documents against alone
python -m tests.gpu.one_model dry IMPL                          parameters of a dry run of 4 ranks
python -m tests.gpu.one_model open IMPL DTYPE                   the first lines of a run's log
python -m tests.gpu.one_model stall FOLDER LAYERS               seconds that saves hold training up
"""

import json
import sys
import time
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


def open_run(impl: str, dtype: str) -> None:
    """What a run would say of itself first, on one line."""
    from megatron_ext.devices import device, opening

    run = described(impl=impl, dtype=dtype)
    opening.set_environment(run)
    device.start()
    print(" | ".join(opening.announce(run)))


def dry(impl: str) -> None:
    """Whether each distinct rank at TP 2, PP 2, built without values, is as planned: JSON."""
    from megatron_ext.plan.dry_run import dry_run

    run = described(impl=impl, dtype="bf16")
    run.parallel.tensor_model_parallel_size = 2
    run.parallel.pipeline_model_parallel_size = 2
    print(json.dumps([one.agrees for one in dry_run(run, 4)]))


def stall(folder: str, layers: str) -> None:
    """Blocking seconds of a save and of a background one, and the bytes, as JSON."""
    from megatron_ext.checkpoint.save import Staging, begin, save
    from megatron_ext.devices import device
    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env

    run = described(impl="auto", dtype="bf16")
    run.model.num_layers = int(layers)
    started = groups.start(run.parallel, Env.read({}), seed=1)
    chunks = build_model(run, started)
    optimizer = build_optimizer(run, chunks, started)
    common = {"run": run, "chunks": chunks, "optimizer": optimizer, "groups": started}
    seconds: dict[str, list[float]] = {"blocking": [], "background": []}
    staging = Staging()
    for step in range(1, 7):
        state = {**STATE, "step": step}
        device.current().synchronize()
        clock = time.perf_counter()
        if step % 2:
            path = save(Path(folder), state=state, **common)
            seconds["blocking"].append(time.perf_counter() - clock)
        else:
            pending = begin(Path(folder), state=state, staging=staging, **common)
            seconds["background"].append(time.perf_counter() - clock)
            path = pending.finish()
    size = sum(file.stat().st_size for file in path.rglob("*"))
    print(json.dumps({**seconds, "bytes": size}))


if __name__ == "__main__":
    modes = {"make": make, "read": read, "isolate": isolate, "open": open_run}
    modes |= {"dry": dry, "stall": stall}
    modes[sys.argv[1]](*sys.argv[2:])
