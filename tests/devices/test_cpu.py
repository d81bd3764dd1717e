"""The CPU back end replaces named places only, and leaves torch as it was everywhere else."""

import subprocess
import sys
import warnings

import pytest
import torch

from megatron_ext.devices import cpu, device


@pytest.fixture(autouse=True)
def _entered():
    device.start()


def test_no_mode_intercepts_operators():
    assert torch.overrides._get_current_function_mode_stack() == []


def test_torch_itself_still_refuses_cuda():
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_modules_that_spell_cuda_out_get_cpu_tensors():
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.nn is torch.nn
    assert schedules.torch.Tensor is torch.Tensor


def test_type_names_are_cudas_only_inside_the_optimizers():
    seen = []
    cpu._with_cuda_type_names(lambda: seen.append(torch.zeros(1).type()))()
    assert seen == ["torch.cuda.FloatTensor"]
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_a_random_stream_goes_on_where_it_stopped():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(3)
    outside = torch.get_rng_state()
    tracker.add("model-parallel-rng", 7)
    assert torch.equal(torch.get_rng_state(), outside)
    draws = []
    for _ in range(2):
        with tracker.fork():
            draws.append(torch.rand(3))
    assert torch.equal(torch.get_rng_state(), outside)
    both = torch.Generator().manual_seed(7)
    assert torch.equal(torch.cat(draws), torch.cat([torch.rand(3, generator=both) for _ in "ab"]))


@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_clipping_scales_only_what_is_too_long(limit):
    parameters = [torch.zeros(n, requires_grad=True) for n in (3, 5)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    total = float(torch.cat([p.grad for p in parameters]).norm())
    cpu._clip(parameters, limit, total)
    after = float(torch.cat([p.grad for p in parameters]).norm())
    assert after == pytest.approx(min(limit, total), rel=1e-5)


def test_expected_warnings_are_silenced_and_others_are_not():
    with pytest.warns(UserWarning, match="something else"), device.expected_warnings():
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("something else", stacklevel=1)


def test_importing_megatron_loads_no_compiler():
    code = (
        "import sys; from megatron_ext.devices import device; device.start(); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
