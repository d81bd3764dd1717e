"""One full training step against transformers' Llama with SDPA and torch AdamW, same shape.

    python -m tools.bench.step --seq-length 1024 4096

Both sides hold the same weights and take the same tokens: forward, loss, backward, clipping to a
norm of 1 and the AdamW update. Ours goes through Megatron's schedule, gradient buffers and
optimizer, as the trainer does. The machine's matmul peak is measured between the pairs.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

from launch.cli import refusing
from tools.bench.pairs import interleave, measure, report

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
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import torch

    torch.set_num_threads(args.threads)
    for length in args.seq_length:
        _compare(length, args)
    return 0


def _compare(length: int, args: argparse.Namespace) -> None:
    import torch

    tokens = torch.randint(0, SHAPE["vocab_size"], (1, length + 1))
    ours, peer = _ours(tokens, args), _peer(tokens, args)
    losses = [ours(), peer()]
    gemm: list[float] = []
    pairs = interleave(_with_peak(ours, gemm, args.dtype), peer, pairs=args.pairs)
    adam = "fused " * args.fused_peer + "AdamW"
    report(
        f"training step, {_parameters() / 1e6:.1f} M parameters, {args.dtype}, 1 x {length} "
        f"tokens, {args.threads} thread(s); first losses {losses[0]:.5f} and {losses[1]:.5f}",
        pairs,
        ours="megatron_ext: schedule, DDP, AdamW",
        peer=f"transformers Llama, SDPA, torch {adam}",
        bar="0.85",
    )
    peak, work = statistics.median(gemm), _flops(length)
    for side in ("ours", "peer"):
        achieved = work / pairs.median(side)
        print(
            f"  {side}: {achieved / 1e9:.1f} GFLOP per CPU-s, {achieved / peak:.1%} of the "
            f"machine's {peak / 1e9:.1f} (1024-cube matmul, median over the run)"
        )


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
    groups.stop()
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


def _with_peak(step: Callable[[], float], gemm: list[float], dtype: str) -> Callable[[], float]:
    """``step``, and a sample of the matmul rate taken after the clock of the pair before."""
    import torch

    a = torch.randn(1024, 1024, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)

    def run() -> float:
        return step()

    torch.mm(a, a)
    for _ in range(9):
        gemm.append(2 * 1024**3 / measure(lambda: torch.mm(a, a)).cpu)
    return run


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
