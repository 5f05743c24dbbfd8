# SPDX-License-Identifier: Apache-2.0
"""Without a graph the reference goes through the experts one by one; nothing else may change."""

import pytest
import torch

from cumo_kernels import reference
from tests.numerics import relative_error


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("T", [0, 1, 37], ids=["no-tokens", "one-token", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_inference_gives_what_training_does(T, bias, gated, dtype):
    E, K, D, F, O = 4, 3, 9, 10, 7
    F1 = 2 * F if gated else F
    shapes = (T, D), (T, K), (E, F1, D), (E, O, F), (E, F1), (E, O), (T, O)
    x, weight, w1, w2, b1, b2, residual = (torch.randn(shape, dtype=dtype) for shape in shapes)
    expert = torch.randint(-1, E + 2, (T, K))  # some choices are ignored, some experts named twice
    biases = (b1, b2) if bias else (None, None)
    options = {"activation": "quick_gelu", "gated": gated, "residual_TO": residual}
    trained = reference.moe_mlp(x, weight, expert, w1, w2, *biases, **options)
    with torch.no_grad():
        inferred = reference.moe_mlp(x, weight, expert, w1, w2, *biases, **options)
    assert inferred.dtype == dtype
    assert relative_error(inferred, trained) <= 2 * torch.finfo(dtype).eps
