"""One full training step against transformers' Llama with SDPA and torch AdamW, same shape.

    python -m tools.bench.step --seq-length 1024 4096

Each side has a process of its own, and they step in turn on the same tokens: forward, loss,
backward, clipping to a norm of 1 and the AdamW update. Ours goes through Megatron's schedule,
gradient buffers and optimizer, as the trainer does. A matmul is timed between the pairs.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launch.cli import refusing
from tools.bench.pairs import Pairs, Sample, measure, report

SHAPE = {
    "num_layers": 12,
    "hidden_size": 384,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "vocab_size": 16384,
}
"""31.5 M parameters, of which 12.6 M are embedding and head."""

LR, CLIP = 1e-4, 1.0


def main() -> int:
    """Print the ratio at each length."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seq-length", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused-peer", action="store_true", help="give the peer AdamW(fused=True)")
    parser.add_argument("--norm-head", action="store_true", help="Norm-Head on our side only")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    for length in args.seq_length:
        _compare(length, args)
    return 0


def _compare(length: int, args: argparse.Namespace) -> None:
    ours, peer = Side(_ours, length, args), Side(_peer, length, args)
    gemm: list[float] = []
    first = [side.step().value for side in (ours, peer)]
    for side in (ours, peer):
        side.step()
    samples = []
    for _ in range(args.pairs):
        samples.append((ours.step().sample, peer.step().sample))
        gemm.append(ours.matmul_rate())
    pairs = Pairs(ours=[one for one, _ in samples], peer=[other for _, other in samples])
    adam = "fused " * args.fused_peer + "AdamW"
    report(
        f"training step, {_parameters() / 1e6:.1f} M parameters, {args.dtype}, 1 x {length} "
        f"tokens, {args.threads} thread(s); first losses {first[0]:.4f} and {first[1]:.4f}",
        pairs,
        ours="megatron_ext: schedule, DDP, AdamW",
        peer=f"transformers Llama, SDPA, torch {adam}",
        bar="0.85",
    )
    peak, work = statistics.median(gemm), _flops(length)
    for name in ("ours", "peer"):
        achieved = work / pairs.median(name)
        print(
            f"  {name}: {achieved / 1e9:.1f} GFLOP per CPU-s, {achieved / peak:.0%} of the "
            f"{peak / 1e9:.1f} of a 1024-cube matmul between the pairs"
        )
    for side in (ours, peer):
        side.close()


@dataclass(frozen=True)
class Step:
    """What a step returned and cost."""

    value: float
    sample: Sample


class Side:
    """One side in a process of its own, as somebody who uses only it would run it."""

    def __init__(self, build: Any, length: int, args: argparse.Namespace) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        # spawn: neither side may inherit the other's imports, threads or allocator settings
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=_serve, args=(theirs, build, length, args))
        self.process.start()

    def step(self) -> Step:
        """One training step."""
        return self._ask("step")

    def matmul_rate(self) -> float:
        """FLOP per CPU second of a 1024-cube product, the best of three."""
        return self._ask("matmul")

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join()

    def _ask(self, word: str) -> Any:
        self.pipe.send(word)
        return self.pipe.recv()


def _serve(pipe: Any, build: Any, length: int, args: argparse.Namespace) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, length + 1))
    run = build(tokens, args)
    a = torch.randn(1024, 1024).to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    losses: list[float] = []
    while word := pipe.recv():
        if word == "matmul":
            cost = min(measure(lambda: torch.mm(a, a)).cpu for _ in range(3))
            pipe.send(2 * 1024**3 / cost)
            continue
        sample = measure(lambda: losses.append(run()))
        pipe.send(Step(losses[-1], sample))


def _ours(tokens: Any, args: argparse.Namespace) -> Callable[[], float]:
    import torch

    from megatron_ext.config import RunConfig
    from megatron_ext.devices.config import PrecisionConfig
    from megatron_ext.models.config import ModelConfig
    from megatron_ext.models.gpt import build_model
    from megatron_ext.optim.build import build_optimizer
    from megatron_ext.optim.config import OptimizerConfig
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.env import Env
    from megatron_ext.train.config import PhaseConfig
    from megatron_ext.train.step import connect, train_step

    run = RunConfig(
        name="bench",
        model=ModelConfig(**SHAPE, norm_head=args.norm_head),
        phases=[PhaseConfig(tokens=1)],
        precision=PrecisionConfig(dtype=args.dtype),
        optimizer=OptimizerConfig(lr=LR, clip_grad=CLIP),
    )
    process_groups = groups.start(run.parallel, Env(), seed=run.seed)
    chunks = build_model(run, process_groups)
    optimizer = build_optimizer(run, chunks, process_groups)
    connect(chunks, optimizer)
    length = tokens.shape[1] - 1
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(length).unsqueeze(0),
        "loss_mask": torch.ones(1, length),
    }

    def step() -> float:
        return train_step(
            chunks,
            optimizer,
            lambda: iter([batch]),
            num_microbatches=1,
            micro_batch_size=1,
            seq_length=length,
            groups=process_groups,
        ).loss

    return step


def _peer(tokens: Any, args: argparse.Namespace) -> Callable[[], float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=SHAPE["num_layers"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_attention_heads=SHAPE["num_attention_heads"],
        num_key_value_heads=SHAPE["num_query_groups"],
        vocab_size=SHAPE["vocab_size"],
        max_position_embeddings=tokens.shape[1],
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=torch.bfloat16 if args.dtype == "bf16" else torch.float32,
    )
    model = LlamaForCausalLM(config).to(config.dtype)
    kind = {"fused": True} if args.fused_peer else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), **kind)
    batch = tokens[:, :-1].contiguous()

    def step() -> float:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def _parameters() -> int:
    from megatron_ext.models.config import ModelConfig
    from megatron_ext.plan.parameters import count_parameters

    return count_parameters(ModelConfig(**SHAPE)).total


def _flops(length: int) -> float:
    from megatron_ext.models.config import ModelConfig
    from megatron_ext.plan.flops import flops_per_token

    return length * flops_per_token(ModelConfig(**SHAPE), length, convention="causal")


if __name__ == "__main__":
    sys.exit(refusing(main))
