"""A few training steps of a small model in any layout, for tests of checkpoints and optimizers."""

from typing import Any

import torch

from megatron_ext.config import RunConfig
from megatron_ext.devices.config import PrecisionConfig
from megatron_ext.models.config import ModelConfig
from megatron_ext.optim.config import OptimizerConfig
from megatron_ext.parallel import groups as parallel_groups
from megatron_ext.parallel.config import ParallelConfig
from megatron_ext.testing import env, meeting
from megatron_ext.train.config import BatchConfig, PhaseConfig

B, S, GLOBAL_BATCH = 1, 16, 4
LR = 1e-2


def small_run(
    *,
    dtype: str = "fp32",
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **parallel: Any,
) -> RunConfig:
    """Four layers of 32 channels, a vocabulary that needs padding, and a Norm-Head."""
    shape: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 100,
        "make_vocab_size_divisible_by": 16,
        "norm_head": True,
    }
    return RunConfig(
        name="small",
        model=ModelConfig(**(shape | (model or {}))),
        phases=[PhaseConfig(tokens=10_000)],
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(dtype=dtype),
        optimizer=OptimizerConfig(**({"lr": LR} | (optimizer or {}))),
        batch=BatchConfig(global_batch_size=GLOBAL_BATCH, micro_batch_size=B, seq_length=S),
    )


class Training:
    """Model and optimizer of this rank, and steps on tokens that depend on the step alone."""

    def __init__(self, run: RunConfig, *, beside: "Training | None" = None) -> None:
        """``beside`` lends its process groups."""
        self.run = run
        self.groups = (
            beside.groups
            if beside
            else parallel_groups.start(run.parallel, env(), seed=run.seed, init_method=meeting())
        )
        from megatron_ext.models.gpt import build_model
        from megatron_ext.optim.build import build_optimizer

        self.chunks = build_model(run, self.groups)
        self.optimizer = build_optimizer(run, self.chunks, self.groups)
        self.step = 0

    def what(self, **state: Any) -> dict[str, Any]:
        """Arguments of save and begin."""
        return {
            "run": self.run,
            "chunks": self.chunks,
            "optimizer": self.optimizer,
            "groups": self.groups,
            "state": {"step": self.step, "tokens": self.step * GLOBAL_BATCH * S, **state},
        }

    def load(self, path: Any, **options: Any) -> dict[str, Any]:
        """Go on from a checkpoint."""
        from megatron_ext.checkpoint.load import load

        state = load(
            path,
            run=self.run,
            chunks=self.chunks,
            optimizer=self.optimizer,
            groups=self.groups,
            **options,
        )
        self.step = state["step"]
        return state

    def train(self, steps: int) -> list[float]:
        """Loss of each step, the same number on every rank."""
        return [self._one_step() for _ in range(steps)]

    def _one_step(self) -> float:
        import torch.distributed as dist
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        dp = self.groups.dp
        micro_batches = GLOBAL_BATCH // (B * dp.size())
        order = torch.Generator().manual_seed(1000 + self.step)
        tokens = torch.randint(self.run.model.vocab_size, (GLOBAL_BATCH, S + 1), generator=order)
        mine = tokens[dp.rank() :: dp.size()]
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            config = chunk.config
            config.finalize_model_grads_func = finalize_model_grads
            if self.run.parallel.overlap_grad_reduce:
                config.no_sync_func = chunk.no_sync
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(mine.split(B)) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=micro_batches,
            seq_length=S,
            micro_batch_size=B,
            forward_only=False,
        )
        self.optimizer.step()
        self.step += 1
        total = torch.zeros((), dtype=torch.float64)
        for one in losses:
            total += one["loss"].double()
        if self.groups.tp.rank() > 0:
            total.zero_()
        dist.all_reduce(total)
        return float(total)


def _forward_step(batches: Any, model: Any) -> Any:
    batch = next(batches)
    tokens, labels = batch[:, :-1], batch[:, 1:]
    positions = torch.arange(S).expand(B, S)
    loss_BS = model(tokens, positions, None, labels=labels.contiguous())

    def loss_of(output_BS: torch.Tensor) -> Any:
        count = torch.tensor(output_BS.numel(), dtype=torch.int)
        return output_BS.float().sum(), count, {"loss": output_BS.detach().float().sum()}

    return loss_BS, loss_of
