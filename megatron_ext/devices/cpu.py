"""Everything that is put in place of CUDA so that the megatron-core 0.16.1 wheel trains on gloo.

Entered once, on machines without a GPU only. Each substitution replaces one named place; nothing
intercepts operators, so a training step costs what it costs. docs/cpu_backend.md lists them.
"""

import contextlib
import ctypes
import importlib
import os
import sys
import types
from collections.abc import Iterable, Iterator
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.devices import cpu_kernels

CPU = torch.device("cpu")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

MODULES_NAMING_CUDA = (
    "megatron.core.dist_checkpointing.exchange_utils",  # receive buffers of parallel loading
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",  # "did all ranks plan alike"
    "megatron.core.distributed.param_and_grad_buffer",  # gradient and parameter buffers
    "megatron.core.optimizer.clip_grads",  # norm and zero-count accumulators
    "megatron.core.optimizer.grad_scaler",  # loss scale
    "megatron.core.optimizer.optimizer",  # overflow flags
    "megatron.core.pipeline_parallel.schedules",  # token counter, autocast
    "megatron.core.rerun_state_machine",  # NaN vote
    "megatron.core.tensor_parallel.data",  # broadcast of a batch over TP
    "megatron.core.transformer.utils",  # default causal mask
    "megatron.core.utils",  # parameter norms and hashes
)
"""Modules that spell ``device="cuda"`` out; they see a ``torch`` whose factories ignore it."""

IMPORTED_WARNING = ("distributed", "inference.contexts", "models.backends")
"""Imported here because they warn on import, and device.start() expects the warnings here."""

MODULES_GATHERING = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.utils",
    "megatron.core.timers",
    "megatron.core.utils",
)
"""Modules that bind torch's gather and scatter under names of their own."""

FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros")


@cache
def enter() -> None:
    """Put every substitution in place. Safe to call again; imports megatron.core."""
    # One CUDA queue per device, without which Megatron warns; there is no such queue here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with _compiling_nothing():
        for name in ("models.gpt", "optimizer", "dist_checkpointing", *IMPORTED_WARNING):
            importlib.import_module(f"megatron.core.{name}")
    _replace_the_cuda_runtime()
    _replace_literal_devices()
    _replace_random_states()
    _replace_type_names()
    _replace_gradient_clipping()
    _replace_collective_names()
    _replace_fused_kernels()
    _keep_freed_memory()


def transformer_fields() -> dict[str, Any]:
    """TransformerConfig fields that differ on gloo: no batched isend and irecv, our own kernels."""
    return {
        "batch_p2p_comm": False,
        "batch_p2p_sync": False,
        "overlap_p2p_comm": False,
        "apply_rope_fusion": True,
        "gradient_accumulation_fusion": True,
    }


@contextlib.contextmanager
def _compiling_nothing() -> Iterator[None]:
    """``torch.compile`` gives a function back as it is while Megatron is imported.

    Megatron decorates its fused element-wise functions with it, none of which runs here, and the
    first use of it loads dynamo and inductor: two fifths of the import.
    """
    kept = torch.compile
    torch.compile = lambda function=None, **options: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = kept


def _replace_the_cuda_runtime() -> None:
    """Calls into the CUDA runtime that would raise here.

    ``current_device`` is where Megatron allocates rotary frequencies, collective outputs, pipeline
    receive buffers and optimizer shards. Streams and events order work that a CPU does in order
    anyway; profiler ranges and synchronisation have nothing to name or wait for.
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.is_current_stream_capturing = lambda: False
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _nothing(name))
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _nothing("range_push"), _nothing("range_pop")
    cuda.Stream, cuda.Event = _CpuStream, _CpuEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: _CpuStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _replace_literal_devices() -> None:
    """``device="cuda"`` written out in a module: swap that module's ``torch``, not torch itself."""
    on_cpu = _TorchOnCpu()
    for name in MODULES_NAMING_CUDA:
        importlib.import_module(name).torch = on_cpu  # type: ignore[attr-defined]


class _TorchOnCpu(types.ModuleType):
    """``torch`` as the modules above see it."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))
        self.autocast = _on_cpu(torch.autocast)

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        setattr(self, name, value)  # the next look-up is an ordinary one
        return value


def _on_cpu(factory: Any) -> Any:
    @wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = CPU
        if args and args[0] == "cuda" and isinstance(args[0], str):
            args = ("cpu", *args[1:])
        return factory(*args, **kwargs)

    return made


def _replace_random_states() -> None:
    """The RNG tracker keeps states of the CUDA generator: here, of the CPU's.

    Megatron's own ``fork`` watches the CPU generator and logs when it moves inside a CUDA region.
    With one generator for both it always moves, so ``fork`` is written again without the watch.
    """
    from megatron.core.tensor_parallel import random

    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    for space in (torch.cuda, torch.cuda.random):
        space.get_rng_state = lambda device="cuda": torch.get_rng_state()  # type: ignore[attr-defined]
        space.set_rng_state = (  # type: ignore[attr-defined]
            lambda state, device="cuda": torch.set_rng_state(state)
        )
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random.CudaRNGStatesTracker.fork = _fork


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from the stream called ``name``, then return to the one before."""
    if name not in tracker.states_:
        raise KeyError(f"RNG state {name} was never added")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


def _replace_type_names() -> None:
    """The optimizers sort parameters by ``param.type() == 'torch.cuda.FloatTensor'``.

    ``Tensor.type`` answers with the CUDA name while they are built, and only then.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    for optimizer in (DistributedOptimizer, Float16OptimizerWithFloat16Params):
        optimizer.__init__ = _with_cuda_type_names(optimizer.__init__)


def _with_cuda_type_names(function: Any) -> Any:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        plain = torch.Tensor.type

        def named(self: torch.Tensor, *to: Any, **options: Any) -> Any:
            name = plain(self, *to, **options)
            return name.replace("torch.", "torch.cuda.") if isinstance(name, str) else name

        torch.Tensor.type = named  # type: ignore[assignment,method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = plain  # type: ignore[method-assign]

    return called


def _replace_gradient_clipping() -> None:
    """The clip asserts CUDA gradients. It, the norm and the master copy also go tensor by tensor
    through temporaries; torch's foreach operators do the same in place. Forgetting gradients reads
    ``.grad`` of the distributed optimizer's views first, at which torch warns.
    """
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    clip_grads.clip_grad_by_total_norm_fp32 = _clip
    optimizer.clip_grad_by_total_norm_fp32 = _clip
    clip_grads.l2_norm_impl = _l2_norm
    optimizer.multi_tensor_scale_impl = _scaled_copy
    optimizer._zero_grad_group_helper = distrib_optimizer._zero_grad_group_helper = (
        _forget_gradients
    )


@torch.no_grad()
def _clip(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale gradients in place so that their global norm is at most ``max_norm``."""
    if isinstance(parameters, torch.Tensor):
        parameters = [parameters]
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    grads = [grad for p in parameters if (grad := getattr(p, name, None)) is not None]
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)


def _l2_norm(chunk: int, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> Any:
    """Norm of all tensors together, in one pass and without Megatron's temporary list."""
    norms = torch._foreach_norm(lists[0])
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1), None


def _scaled_copy(chunk: int, overflow: Any, lists: list[list[torch.Tensor]], scale: float) -> None:
    """``target = source * scale`` over two lists."""
    sources, targets = lists
    torch._foreach_copy_(targets, sources)
    if scale != 1.0:
        torch._foreach_mul_(targets, scale)


def _forget_gradients(
    group: Iterable[torch.Tensor], set_to_none: bool = True, use_decoupled_grad: bool = False
) -> None:
    """Drop (or zero) the gradients of a group of parameters."""
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    for parameter in group:
        if set_to_none:
            setattr(parameter, name, None)
        elif (grad := getattr(parameter, name, None)) is not None:
            grad.detach_().zero_()


def _replace_collective_names() -> None:
    """torch 2.13 warns at every call of the names that Megatron took from it on import."""
    if not hasattr(dist, "all_gather_single"):
        return
    gather, scatter = "dist_all_gather_func", "dist_reduce_scatter_func"
    for name in MODULES_GATHERING:
        module = importlib.import_module(name)
        if hasattr(module, gather):
            setattr(module, gather, dist.all_gather_single)
        if hasattr(module, scatter):
            setattr(module, scatter, dist.reduce_scatter_single)


def _replace_fused_kernels() -> None:
    """Kernels that Megatron takes from Transformer Engine (RoPE) and apex (weight gradients).

    Without them every layer computes the same cosines again and concatenates, and every weight
    gradient is written, then added to the gradient buffer.
    """
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers

    rope_utils.fused_apply_rotary_pos_emb = cpu_kernels.rotate_SBND
    rope_utils.fused_apply_rotary_pos_emb_thd = cpu_kernels.rotate_TND
    layers.fused_weight_gradient_mlp_cuda = cpu_kernels
    layers._grad_accum_fusion_available = True


def _keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks, as CUDA's caching allocator does.

    It gives each back to the kernel otherwise, which zeroes the pages again at the next step:
    19,000 page faults and a twentieth of the time of a step of 30 M parameters.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        for parameter, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            libc.mallopt(parameter, value)


def _nothing(name: str) -> Any:
    """What a CPU does when CUDA is told to wait, to switch device or to name a range.

    A new function each time: torch._dynamo refuses one object under two of torch.cuda's names.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    nothing.__name__ = name
    return nothing


class _CpuEvent:
    """A moment in a stream; on a CPU it has always passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.wait = self.synchronize = _nothing("event")

    def query(self) -> bool:
        """Whether the work before it is done."""
        return True


class _CpuStream:
    """An order of work; on a CPU there is one, the program's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.wait_stream = self.wait_event = self.synchronize = _nothing("stream")

    def record_event(self, event: Any = None) -> Any:
        """An event that has passed."""
        return event or _CpuEvent()
