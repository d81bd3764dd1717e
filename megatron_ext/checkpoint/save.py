"""Save a run's state: every rank writes its boxes aside, the first one seals and publishes."""

import dataclasses
import errno
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.atomic import write_bytes
from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint import index, ranks, rng
from megatron_ext.checkpoint.rectangles import whole
from megatron_ext.checkpoint.resumable import RUN
from megatron_ext.checkpoint.shard import Shard, Slot, write_shard
from megatron_ext.checkpoint.state import share_out, slots
from megatron_ext.digest import sha256_of
from megatron_ext.optim.moments import adam_step

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_ext.config import RunConfig

STATE = "state.json"
logger = logging.getLogger(__name__)


def save(folder: Path, **what: Any) -> Path:
    """Write ``folder/step_.../`` and return it; arguments as in ``begin``. Collective.

    Raises:
        OSError: some rank could not write; the older checkpoints are untouched.
    """
    return begin(folder, **what).finish()


def begin(
    folder: Path,
    *,
    run: "RunConfig",
    chunks: Sequence[Any],
    optimizer: "MegatronOptimizer | None",
    state: dict[str, Any],
    groups: "ProcessGroupCollection",
    about: dict[str, Any] | None = None,
    pinned: bool = False,
    staging: "Staging | None" = None,
) -> "PendingSave":
    """Start a save; with ``staging`` it is copied to host memory and written in the background.

    ``state`` is the trainer's own plain JSON (with ``step``, ``tokens`` and ``phase``), ``about``
    adds to the description (``tokenizer_sha256``, ``layer_map``), ``pinned`` keeps the checkpoint
    from ever being outlived. Collective: all ranks call it at the same step.

    Raises:
        ValueError: ``state`` would not come back from JSON as it is.
    """
    if json.loads(json.dumps(state)) != state:
        raise ValueError("state holds something that JSON does not bring back (tuple, int key)")
    final = folders.step_folder(folder, state["step"])
    aside = Path(ranks.from_first(str(folders.unfinished_folder(folder, state["step"]))))

    if run.parallel.overlap_param_gather:  # else weights await the next forward's all-gather
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)

    def collect() -> list[Slot]:
        mine = [*_own(chunks, optimizer, groups), _rng_slot()]
        return mine if staging is None else staging.copy(mine)

    mine = ranks.together(collect)
    description = _describe(run, state, optimizer) | (about or {}) | {"pinned": pinned}
    documents = {RUN: dataclasses.asdict(run), STATE: state}
    pending = PendingSave(aside, final, mine, documents, description)
    pending.start(background=staging is not None)
    return pending


class PendingSave:
    """A save under way. ``poll`` or ``finish`` must be called on all ranks alike."""

    def __init__(
        self,
        aside: Path,
        final: Path,
        mine: list[Slot],
        documents: dict[str, dict],
        description: dict[str, Any],
    ) -> None:
        self.aside, self.final = aside, final
        self._mine, self._documents, self._description = mine, documents, description
        self._written: Shard | Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, *, background: bool) -> None:
        """Write this rank's shard, here or in a thread that reads it back afterwards."""
        if not background:
            self._write(read_back=False)
            return
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> Path | None:
        """The finished checkpoint once every rank has written, else None."""
        return self.finish() if ranks.all_agree(self._written is not None) else None

    def finish(self) -> Path:
        """Wait for every rank, seal, publish.

        Raises:
            OSError: what went wrong on the first rank that could not write.
        """
        if self._thread is not None:
            self._thread.join()
        outcomes = ranks.gather(self._written)
        failure: Exception | None = None
        if outcomes is not None:
            failure = next((one for one in outcomes if isinstance(one, Exception)), None)
            if failure is None:
                failure = _caught(lambda: self._publish(outcomes))
            if failure is not None:
                _give_up(self.aside)
        failure = ranks.from_first(failure)
        if failure is not None:
            raise failure
        return self.final

    def _write(self, read_back: bool = True) -> None:
        """Keep the shard or the failure for ``finish``: other ranks wait for one of them."""

        def write() -> None:
            if self._thread is not None:
                _stand_back()
            os.makedirs(self.aside, exist_ok=True)
            shard = write_shard(self.aside / f"__{ranks.rank()}_0.distcp", self._mine)
            if read_back:
                _read_back(self.aside, shard)
            self._written = shard

        self._written = _caught(write) or self._written
        self._mine = []

    def _publish(self, shards: list[Shard]) -> None:
        files = {shard.name: (shard.bytes, shard.sha256) for shard in shards}
        common = io.BytesIO()
        torch.save({"step": self._description["step"]}, common)
        small = {
            index.INDEX: index.write(index.merge(shard.tensors for shard in shards)),
            "metadata.json": json.dumps(_MEGATRON_FORMAT).encode(),
            "common.pt": common.getvalue(),
        }
        for name, document in self._documents.items():
            small[name] = json.dumps(document, indent=1, ensure_ascii=False).encode()
        for name, data in small.items():
            write_bytes(self.aside / name, data)
            files[name] = (len(data), sha256(data).hexdigest())
        folders.seal(self.aside, self._description, files)
        folders.publish(self.aside, self.final)


_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Staging:
    """Host memory for one checkpoint, kept between saves: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, mine: list[Slot]) -> list[Slot]:
        """The slots with their elements copied; the originals may change from now on."""
        targets = []
        for slot in mine:
            place = (slot.key, slot.box.offset, slot.data.numel(), slot.data.dtype)
            if place not in self._buffers:
                pin = slot.data.is_cuda
                self._buffers[place] = torch.empty(
                    slot.data.shape, dtype=slot.data.dtype, pin_memory=pin
                )
            targets.append(self._buffers[place])
        for target, slot in zip(targets, mine, strict=True):
            target.copy_(slot.data, non_blocking=True)
        if any(slot.data.is_cuda for slot in mine):
            torch.cuda.synchronize()
        return [dataclasses.replace(s, data=t) for s, t in zip(mine, targets, strict=True)]


def _own(chunks: Sequence[Any], optimizer: Any, groups: "ProcessGroupCollection") -> list[Slot]:
    peers = groups.dp_cp
    return share_out(slots(chunks, optimizer), peers.rank(), peers.size())


def _rng_slot() -> Slot:
    data = rng.capture()
    shape = tuple(data.shape)
    return Slot(f"rng.rank_{ranks.rank()}", shape, whole(shape), data)


def layout(run: "RunConfig") -> dict[str, Any]:
    """How the ranks share the model out; random streams can only be resumed under the same."""
    parallel = run.parallel
    return {
        "world_size": ranks.world_size(),
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "data_parallel_size": parallel.data_parallel_size(ranks.world_size()),
        "sequence_parallel": parallel.sequence_parallel,
        "use_distributed_optimizer": parallel.use_distributed_optimizer,
    }


def _describe(run: "RunConfig", state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    phase = int(state.get("phase", 0))
    # The end of a phase is saved as the start of the next, which has trained nothing yet.
    trained = run.phases[: phase + (1 if state.get("phase_step", 1) else 0)]
    bases = [one.rotary_base for one in trained if one.rotary_base is not None]
    lengths = [one.seq_length or run.batch.seq_length for one in trained]
    return {
        "step": state["step"],
        "tokens": state.get("tokens", 0),
        "phase": phase,
        "name": run.name,
        "vocab_size": run.model.vocab_size,
        "padded_vocab": run.model.padded_vocab(run.parallel.tensor_model_parallel_size),
        "norm_head": run.model.norm_head,
        "rotary_base": bases[-1] if bases else run.model.rotary_base,
        "seq_length": lengths[-1] if lengths else run.batch.seq_length,
        "dtype": run.precision.dtype,
        "tokenizer_sha256": None,
        "layer_map": None,
        "layout": layout(run),
        "optimizer": None if optimizer is None else _optimizer_state(optimizer),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def _optimizer_state(optimizer: "MegatronOptimizer") -> dict[str, Any]:
    """What Adam and the loss scaler know beside tensors."""
    first = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    scaler = getattr(first, "grad_scaler", None)
    scale = {k: float(v) for k, v in scaler.state_dict().items()} if scaler else {}
    return {"adam_step": adam_step(optimizer), "loss_scale": scale}


def _read_back(aside: Path, shard: Shard) -> None:
    """Check what reached the disk, past the page cache where the system allows it."""
    path = aside / shard.name
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256_of(path, follow_links=False) != shard.sha256:
        raise OSError(errno.EIO, "the disk returns other bytes than were written", str(path))


def _stand_back() -> None:
    """Let this thread, and the ones it starts, run on what training leaves of the processors."""
    if sys.platform == "linux":  # elsewhere the priority would be the whole process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _caught(act: Callable[[], None]) -> Exception | None:
    """What ``act`` raised, named by rank, as something that can be told to the other ranks."""
    try:
        act()
    except Exception as error:
        said = f"rank {ranks.rank()} cannot save: "
        cause: BaseException | None = error
        while cause is not None:  # torch.save's own complaint hides that of the disk
            if isinstance(cause, OSError):
                return OSError(cause.errno, said + str(cause))
            cause = cause.__context__
        logger.exception("%s%r", said, error)
        return RuntimeError(f"{said}{error!r}")
    return None


def _give_up(aside: Path) -> None:
    try:
        folders.remove(aside)
    except OSError as error:
        logger.warning("could not remove the unfinished %s: %s", aside, error)
