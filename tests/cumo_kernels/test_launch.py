# SPDX-License-Identifier: Apache-2.0
"""The door through which kernels are launched: what it records, and what it lets through TMA."""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels.kernels import launch
from cumo_kernels.kernels.launch import can_use_tma, record_launches, target_of
from cumo_kernels.tiling import Target
from tests.cumo_kernels.harness import make_layer

H100 = Target.cuda(90, 132)


def call(device, **changes):
    with ck.use_backend("triton"):
        return ck.moe_mlp(**{**make_layer(device), **changes})


def test_blocks_of_recording_nest_and_end(device):
    with record_launches() as outer:
        call(device)
        with record_launches() as inner:
            call(device)
        call(device)
    call(device)
    assert len(inner) == 4
    assert len(outer) == 8


def test_recording_ends_with_an_exception(device):
    with pytest.raises(KeyError), record_launches(H100):
        raise KeyError
    assert launch._recording is None
    assert call(device).isfinite().all()


def test_dry_run_takes_tiles_of_its_target_and_launches_nothing(device):
    with record_launches(H100) as launches:
        assert target_of(torch.zeros(1, device=device)) == H100
        unwritten = call(device)
    names = [launched.kernel.__name__ for launched in launches]
    assert names == ["_plan_dispatch_kernel", "_grouped_gemm_kernel", "_grouped_gemm_kernel", "_combine_kernel"]
    assert all(launched.meta["num_stages"] > 1 for launched in launches[1:3])
    assert unwritten.isnan().all()  # memory is poisoned


def test_a_launch_of_nothing_is_none(device):
    layer = make_layer(device, T=0)
    with ck.use_backend("triton"), record_launches() as launches:
        ck.moe_mlp(**layer)
    assert launches == []


@pytest.mark.parametrize(
    ("rows", "gated", "programs"),
    [
        pytest.param(2308, False, {132}, id="training-one-program-per-processor"),
        pytest.param(8, True, {264}, id="decoding-two-programs-per-processor"),
    ],
)
def test_persistent_programs_fill_the_card(rows, gated, programs, device):
    D, F, E = 1024, 4096, 4
    shapes = {"x_TD": (rows, D), "weight_TK": (rows, 2), "w1_EFD": (E, F * (1 + gated), D), "w2_EOF": (E, 8 * D, F)}
    layer = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    expert_TK = torch.zeros(rows, 2, dtype=torch.int32, device=device)
    with ck.use_backend("triton"), record_launches(H100) as launches:
        ck.moe_mlp(expert_TK=expert_TK, gated=gated, **layer)
    grids = {launched.grid[0] for launched in launches if launched.kernel.__name__ == "_grouped_gemm_kernel"}
    assert grids == programs


@pytest.mark.parametrize(
    ("view", "usable"),
    [
        pytest.param(lambda t: t, True, id="whole"),
        pytest.param(lambda t: t[:, :24], True, id="columns-of-a-wider-tensor"),
        pytest.param(lambda t: t[3:], True, id="rows-from-an-aligned-one"),
        pytest.param(lambda t: t[:, 8:], True, id="columns-from-16-bytes-on"),
        pytest.param(lambda t: t[:, 1:], False, id="base-not-on-16-bytes"),
        pytest.param(lambda t: t.T, False, id="transposed"),
        pytest.param(lambda t: t[:, ::2], False, id="every-other-column"),
        pytest.param(lambda t: t[:1].expand(9, 32), False, id="stride-0"),
        pytest.param(lambda t: t.flatten()[: 9 * 12].view(9, 12), False, id="rows-of-24-bytes"),
        pytest.param(lambda t: t[:0], False, id="empty"),
    ],
)
def test_what_a_descriptor_can_address(view, usable, device):
    assert can_use_tma(view(torch.zeros(9, 32, dtype=torch.bfloat16, device=device))) == usable


def test_a_descriptor_can_address_stacked_weights(device):
    w_EFD = torch.zeros(3, 5, 8, device=device)
    assert can_use_tma(w_EFD)
    assert can_use_tma(w_EFD[1:, 1:, 4:])
    assert not can_use_tma(torch.zeros(3, 5, 7, device=device))
