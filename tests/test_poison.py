# SPDX-License-Identifier: Apache-2.0
"""Poisoned memory is what it says, and nothing else about it differs from fresh memory."""

import pytest
import torch

from tests.poison import GUARD, poisoned, untouched


@pytest.mark.usefixtures("poisoned_memory")
def test_fresh_memory_is_poisoned(device):
    assert torch.empty(3, 4, device=device).isnan().all()
    assert torch.empty_like(torch.zeros(3, device=device)).isnan().all()
    assert torch.zeros(3, device=device).new_empty((2, 2), dtype=torch.float16).isnan().all()
    assert (torch.empty(3, dtype=torch.int32, device=device) == -(2**31)).all()


@pytest.mark.usefixtures("poisoned_memory")
def test_layout_and_flags_stay_as_asked_for(device):
    transposed = torch.zeros(3, 4, device=device).T
    assert torch.empty_like(transposed).stride() == (1, 4)
    assert torch.empty_like(transposed, memory_format=torch.contiguous_format).is_contiguous()
    leaf = torch.empty(3, device=device, requires_grad=True)
    assert leaf.requires_grad
    assert leaf.is_leaf
    assert not leaf._is_view()
    assert torch.empty(0, 3).shape == (0, 3)
    assert torch.empty(3, device="meta").is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize(("at", "inside"), [(-1, False), (0, True), (6, True), (7, False)])
def test_write_past_an_end_shows(at, inside, dtype, device):
    guards = []
    tensor = poisoned(torch.zeros, guards)(7, dtype=dtype, device=device)
    assert untouched(guards)
    tensor.as_strided((1,), (1,), GUARD + at).fill_(1)
    assert untouched(guards) == inside
