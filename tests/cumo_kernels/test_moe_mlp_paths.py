# SPDX-License-Identifier: Apache-2.0
"""The fused layer on the paths and tiles that cards take and the interpreter does not by itself."""

import dataclasses

import pytest
import torch

from cumo_kernels import tiling
from cumo_kernels.backend import interpreted
from cumo_kernels.kernels import launch
from cumo_kernels.kernels.launch import record_launches
from cumo_kernels.tiling import GemmTile, Target
from tests.cumo_kernels.harness import FP32_AND_BF16, PLAIN_AND_GATED, assert_agrees, make_layer

GEMM_TILE = tiling.gemm_tile

# D, F, O
WIDTHS = [
    pytest.param((24, 40, 56), id="rows-of-whole-16-bytes-go-through-tma"),
    pytest.param((25, 41, 9), id="other-rows-go-by-pointers"),
    pytest.param((24, 41, 9), id="tokens-by-tma-and-hidden-rows-by-pointers"),
    pytest.param((25, 40, 9), id="hidden-rows-by-tma-and-tokens-by-pointers"),
    pytest.param((40, 72, 40), id="several-tiles-in-every-dimension"),
]


@pytest.fixture
def tma(monkeypatch):
    """As on a card that has a tensor memory accelerator: a sorted copy of the tokens, and descriptors."""
    if interpreted():
        monkeypatch.setattr(launch, "INTERPRETER", Target(arch=0, num_sms=3, has_tma=True))
    elif torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no tensor memory accelerator")
    monkeypatch.setattr(tiling, "use_sorted_copy", lambda *_: True)


@pytest.mark.usefixtures("tma")
@pytest.mark.parametrize(
    ("gated", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],
    ids=["plain-fp32", "gated-fp32", "gated-bf16"],
)
@pytest.mark.parametrize("widths", WIDTHS)
def test_tensor_memory_accelerator(widths, gated, dtype, device):
    with record_launches() as launches:
        assert_agrees("moe_mlp", make_layer(device, 9, 2, 3, *widths, gated=gated, dtype=dtype), gated=gated)
    used = [launched.meta["W_TMA"] for launched in launches if "W_TMA" in launched.meta]
    unit = 16 // dtype.itemsize
    assert len(used) == 4
    assert all(used) == all(width % unit == 0 for width in widths)


@pytest.mark.usefixtures("tma")
@pytest.mark.parametrize("name", ["w1_EFD", "w2_EOF"])
def test_descriptor_of_weights_stored_transposed(name, device):
    layer = make_layer(device, 9, 2, 4, 24, 40, 56)
    layer[name] = layer[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert_agrees("moe_mlp", layer)


@pytest.mark.usefixtures("tma")
@pytest.mark.parametrize(("F", "by_tma"), [(24, True), (20, False)], ids=["up-half-aligned", "up-half-unaligned"])
def test_descriptor_of_gated_weights_stored_transposed(F, by_tma, device):
    """The up projection begins at column F of a row of 2 F, which need not be a multiple of 16 bytes."""
    layer = make_layer(device, 9, 2, 3, 24, F, 56, gated=True, dtype=torch.bfloat16)
    layer["w1_EFD"] = layer["w1_EFD"].transpose(1, 2).contiguous().transpose(1, 2)
    with record_launches() as launches:
        assert_agrees("moe_mlp", layer, gated=True)
    assert [launched.meta["W_TMA"] for launched in launches if launched.meta.get("GATED")][0] == by_tma


@pytest.mark.usefixtures("tma")
def test_descriptor_past_the_end_of_an_expert_reads_zeros_not_the_next_expert(device):
    layer = make_layer(device, 9, 2, 4, 24, 40, 56)
    for name in ("w1_EFD", "w2_EOF"):  # tiles of the experts before the last end in it: NaN would spread from there
        layer[name][3] = float("nan")
    layer["expert_TK"] = layer["expert_TK"] % 3
    assert_agrees("moe_mlp", layer, wrt=["x_TD", "weight_TK", "b1_EF", "b2_EO"])


def replace_tiles(monkeypatch, kinds, **changes):
    """Change fields of the tiles of these kinds of GEMM."""

    def gemm_tile(*args, **kwargs):
        tile = GEMM_TILE(*args, **kwargs)
        kind = kwargs.get("kind") or args[5]
        return dataclasses.replace(tile, **changes) if kind in kinds else tile

    monkeypatch.setattr(tiling, "gemm_tile", gemm_tile)


@FP32_AND_BF16
@PLAIN_AND_GATED
@pytest.mark.parametrize("T", [1, 20], ids=["one-token", "tails"])
def test_swapped_operands_of_decoding(T, gated, dtype, device, monkeypatch):
    decode = dataclasses.asdict(GemmTile(16, 32, 32, num_warps=1, num_stages=1, SWAP=True))
    replace_tiles(monkeypatch, ("forward", "gated"), **decode)
    assert_agrees("moe_mlp", make_layer(device, T, gated=gated, dtype=dtype), gated=gated)


@PLAIN_AND_GATED
@pytest.mark.parametrize("slices", [1, 2, 4, 8])
def test_epilogue_in_slices_of_columns(slices, gated, device, monkeypatch):
    replace_tiles(monkeypatch, ("forward", "gated", "dact", "dact_gated"), SLICES=slices)
    assert_agrees("moe_mlp", make_layer(device, gated=gated), gated=gated)


@PLAIN_AND_GATED
@pytest.mark.parametrize("sides", [(16, 64, 32), (64, 16, 32), (32, 16, 64)], ids=str)
def test_tiles_of_unequal_sides(sides, gated, device, monkeypatch):
    """The interpreter's own tiles are cubes, with which a kernel that takes one side for another would pass."""
    kinds = ("forward", "gated", "dact", "dact_gated", "wgrad")
    replace_tiles(monkeypatch, kinds, **dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sides, strict=True)))
    assert_agrees("moe_mlp", make_layer(device, 20, 2, 2, 36, 68, 33, gated=gated), gated=gated)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_panels_of_row_tiles(group, device, monkeypatch):
    replace_tiles(monkeypatch, ("forward", "dact", "wgrad"), BLOCK_M=16, GROUP_M=group)
    assert_agrees("moe_mlp", make_layer(device, 70, 1, 1, 20, 36, 40))


@pytest.mark.parametrize("programs", [1, 7, 1000])
def test_any_number_of_persistent_programs(programs, device, monkeypatch):
    if not interpreted():
        pytest.skip("a card has the number of processors that it has")
    monkeypatch.setattr(launch, "INTERPRETER", Target(arch=0, num_sms=programs, has_tma=False))
    assert_agrees("moe_mlp", make_layer(device, 20, 2, 2, 20, 68, 17))
