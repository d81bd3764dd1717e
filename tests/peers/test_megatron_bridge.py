"""Another converter makes the same Megatron tensors from the same folder: ``make test-peers``.

Megatron-Bridge 0.3.1 builds Transformer Engine layers, so it needs the environment of
``make test-te``, and Bridge itself on PYTHONPATH. It knows Llama of our families, tied and not.
"""

import importlib.util

import pytest
import torch

from tests.te.conftest import LAYOUT_ONLY

HAS_BRIDGE = LAYOUT_ONLY and importlib.util.find_spec("megatron.bridge") is not None
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not HAS_BRIDGE, reason="needs the environment of `make test-peers`"),
    pytest.mark.filterwarnings("ignore"),  # Bridge's own, on import and of transformers 5
]


def bridged(folder):
    """Bridge's model of a Hugging Face folder, weights loaded, in fp32 on the CPU."""
    from megatron.bridge import AutoBridge

    from tests.te.fake_extension import pretending

    bridge = AutoBridge.from_hf_pretrained(folder)
    provider = bridge.to_megatron_provider(load_weights=False)
    provider.use_cpu_initialization, provider.perform_initialization = True, False
    provider.params_dtype, provider.bf16, provider.fp16 = torch.float32, False, False
    provider.gradient_accumulation_fusion = False
    provider.finalize()
    with pretending():
        model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    return model


def compare(family, folder):
    from megatron_ext.convert.sharded_reader import open_sharded
    from megatron_ext.convert.to_megatron import to_megatron
    from megatron_ext.parallel import groups
    from megatron_ext.parallel.config import ParallelConfig
    from megatron_ext.testing import env, meeting
    from tests.convert.models import SIZES, make

    groups.start(ParallelConfig(), env(), seed=1, init_method=meeting())
    make(family, folder / "hf")
    to_megatron(folder / "hf", folder / "ckpt")
    ours = open_sharded(folder / "ckpt").tensors
    theirs = dict(bridged(folder / "hf").named_parameters())
    assert len(theirs) == (27 if family == "llama" else 26)
    for name, parameter in theirs.items():
        parts = name.split(".")
        layer = int(parts.pop(2)) if "layers" in parts else None
        key = ".".join(parts)
        rows = SIZES["vocab_size"] if "embed" in key or "output" in key else None
        assert torch.equal(ours[key].read(layer)[:rows], parameter.detach()[:rows]), name


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_our_tensors_are_the_ones_megatron_bridge_makes(family, tmp_path):
    from megatron_ext.testing import run_on_ranks

    run_on_ranks(compare, family, tmp_path, world_size=1, timeout=300)
