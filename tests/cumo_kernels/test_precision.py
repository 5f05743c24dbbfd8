# SPDX-License-Identifier: Apache-2.0
"""Products of float32 follow PyTorch's settings, by either interface; those of the router never do."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels.kernels.launch import record_launches
from cumo_kernels.tiling import Target
from tests.cumo_kernels.harness import make_layer

matmul = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings_as_before():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = matmul.fp32_precision = "none"


def set_everywhere(precision):
    torch.backends.fp32_precision = precision


def set_for_matmul(precision):
    matmul.fp32_precision = precision


SETTINGS = [
    pytest.param(torch.set_float32_matmul_precision, "highest", "ieee", id="default"),
    pytest.param(torch.set_float32_matmul_precision, "high", "tf32", id="float32_matmul_precision"),
    pytest.param(set_everywhere, "tf32", "tf32", id="fp32_precision-of-everything"),
    pytest.param(set_for_matmul, "tf32", "tf32", id="fp32_precision-of-matmul"),
    pytest.param(set_for_matmul, "ieee", "ieee", id="fp32_precision-ieee"),
]


@pytest.mark.parametrize(("set_precision", "value", "expected"), SETTINGS)
def test_experts_follow_the_setting(set_precision, value, expected, device):
    layer = make_layer(device)
    floats = {name: tensor.requires_grad_() for name, tensor in layer.items() if tensor.is_floating_point()}
    set_precision(value)
    with ck.use_backend("triton"), record_launches(Target.cuda(90, 132)) as launches:
        y_TO = ck.moe_mlp(**layer | floats)
        torch.autograd.grad(y_TO, list(floats.values()), torch.empty_like(y_TO))
    assert {launched.meta["PRECISION"] for launched in launches if "PRECISION" in launched.meta} == {expected}


def test_bfloat16_is_exact_whatever_the_setting(device):
    layer = make_layer(device, dtype=torch.bfloat16)
    set_for_matmul("tf32")
    with ck.use_backend("triton"), record_launches(Target.cuda(90, 132)) as launches:
        ck.moe_mlp(**layer)
    assert {launched.meta["PRECISION"] for launched in launches if "PRECISION" in launched.meta} == {"ieee"}
