"""Adam's state, wherever Megatron's optimizers keep it: plain, mixed-precision or distributed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """One parameter as this rank's optimizer updates it."""

    param: torch.Tensor
    """The model's parameter."""
    main: torch.Tensor
    """What Adam updates: the parameter, its fp32 master, or this rank's flat range of either."""
    start: int
    """Where ``main`` begins in the flattened parameter."""
    inner: Any
    """The Adam that holds the state."""
    sharded: bool = False
    """Whether data-parallel peers hold the rest of it, rather than the same."""

    def state(self) -> dict[str, Any]:
        """Adam's state of this parameter, with zero moments before the first step."""
        state = self.inner.state[self.main]
        if MOMENTS[0] not in state:
            _prime(self.inner, self.main, state)
        return state

    def has_master(self) -> bool:
        """Whether ``main`` is other memory than the parameter."""
        return self.param.dtype != torch.float32


def held(optimizer: "MegatronOptimizer") -> Iterator[Held]:
    """Every parameter, or range of one, that this rank updates."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.is_stub_optimizer:
            continue
        if hasattr(one, "gbuf_ranges"):
            yield from _distributed(one)
        elif hasattr(one, "float16_groups"):
            pairs = (
                (one.float16_groups, one.fp32_from_float16_groups),
                (one.fp32_from_fp32_groups, one.fp32_from_fp32_groups),
            )
            for param, main in _zipped(pairs):
                yield Held(param, main, 0, one.optimizer)
        else:
            for group in one.param_groups:
                for param in group["params"]:
                    yield Held(param, param, 0, one.optimizer)


def _distributed(one: Any) -> Iterator[Held]:
    pairs = (
        (one.model_float16_groups, one.shard_fp32_from_float16_groups),
        (one.model_fp32_groups, one.shard_fp32_groups),
    )
    for param, main in _zipped(pairs):
        start = one._get_model_param_range_map(param)["param"].start
        yield Held(param, main, start, one.optimizer, sharded=True)


def _zipped(pairs: tuple) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for params_by_group, mains_by_group in pairs:
        for params, mains in zip(params_by_group, mains_by_group, strict=True):
            yield from zip(params, mains, strict=True)


def _prime(inner: Any, main: torch.Tensor, state: dict[str, Any]) -> None:
    """What torch's Adam sets up in its first step, so that a step after loading finds it."""
    if isinstance(inner, torch.optim.Adam):
        on_device = inner.param_groups[0]["fused"] or inner.param_groups[0]["capturable"]
        place = main.device if on_device else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=place)
    for name in MOMENTS:
        state[name] = torch.zeros_like(main, memory_format=torch.preserve_format)


def adam_step(optimizer: "MegatronOptimizer") -> int:
    """Updates Adam has made; it corrects the bias of its moments by it."""
    for one in held(optimizer):
        state = one.state()
        if "step" in state:
            return int(state["step"])
        break
    for group in optimizer.param_groups:  # Transformer Engine and apex count per group
        if group["params"] and "step" in group:
            return int(group["step"])
    return 0


def set_adam_step(optimizer: "MegatronOptimizer", step: int) -> None:
    """Make the next update number ``step`` + 1."""
    per_group = False
    for one in held(optimizer):
        state = one.state()
        if "step" in state:
            state["step"].fill_(step)
        else:
            per_group = True
    if per_group:
        for group in optimizer.param_groups:
            group["step"] = step


@torch.no_grad()
def reset_moments(optimizer: "MegatronOptimizer") -> None:
    """Forget all gradients seen: zero moments, and bias correction from the start."""
    for one in held(optimizer):
        state = one.state()
        for name in MOMENTS:
            state[name].zero_()
    set_adam_step(optimizer, 0)
