"""Random-number states of one rank, as bytes without pickle."""

import json
import random
from typing import Any

import numpy as np
import torch


def capture() -> torch.Tensor:
    """Python's, NumPy's, torch's and Megatron's streams of this rank, as JSON in a uint8 tensor."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
        "megatron": {n: _hex(s) for n, s in get_cuda_rng_tracker().get_states().items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def restore(data: torch.Tensor) -> None:
    """Continue the streams where ``capture`` found them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = json.loads(bytes(data.tolist()))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, next_gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, next_gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    get_cuda_rng_tracker().set_states({n: _tensor(s) for n, s in state["megatron"].items()})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
