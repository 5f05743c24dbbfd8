# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: streams, graphs, synchronisation, tensor cores and TMA, and sizes past 2**31.

The tests of the other modules run on the GPU too, if there is one, at small sizes.
"""

import pytest
import torch

import cumo_kernels as ck
from cumo_kernels import reference, tiling
from cumo_kernels.kernels.launch import record_launches
from tests.cumo_kernels.harness import (
    PLAIN_AND_GATED,
    assert_agrees,
    differentiable,
    differentiate,
    in_float64,
    make_layer,
    random_experts,
)
from tests.numerics import assert_as_exact_as_eager, assert_bitwise_equal

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
SORTED_COPY = pytest.mark.parametrize("sorted_copy", [False, True], ids=["gathered", "sorted-copy"])


@pytest.fixture
def poisoned_memory():
    """None: filling memory would be captured in graphs, and take most of the time at large sizes."""


@pytest.fixture
def gigabytes_free():
    """Skips a test that needs more memory than there is."""

    def require(gigabytes):
        free, _ = torch.cuda.mem_get_info()
        if free < gigabytes * 2**30:
            pytest.skip(f"needs {gigabytes} GB of free GPU memory, got {free / 2**30:.0f}")

    return require


class Step:
    """Router, layer and losses, forward and backward, on leaves that stay where they are."""

    def __init__(self, device, T=600, E=4, gated=False):
        self.gated = gated
        self.layer = make_layer(device, T, 2, E, 128, 256, 192, gated=gated, dtype=BF16)
        del self.layer["weight_TK"], self.layer["expert_TK"]
        self.logits_TE = torch.randn(T, E, device=device)
        self.leaves = [self.logits_TE, *self.layer.values()]
        for leaf in self.leaves:
            leaf.requires_grad_()
        self.cotangents = [torch.randn(shape, device=device) for shape in ((T, 192), (3,), (3,))]
        self.cotangents[0] = self.cotangents[0].to(BF16)

    def renew(self):
        """Other values in the same memory."""
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.copy_(leaf.roll(1))

    def __call__(self):
        """Every output and gradient, by position."""
        routing = ck.topk_gating(self.logits_TE, 2, segment=self.logits_TE.shape[0] // 3)
        y_TO = ck.moe_mlp(
            weight_TK=routing.weight_TK, expert_TK=routing.expert_TK, activation="silu", gated=self.gated, **self.layer
        )
        outputs = (y_TO, routing.balance_S, routing.z_S)
        grads = torch.autograd.grad(outputs, self.leaves, self.cotangents)
        return {str(i): t.detach() for i, t in enumerate((*outputs, routing.expert_TK, *grads))}


@pytest.fixture
def force_path(monkeypatch):
    """Chooses between gathering on load and a sorted copy (through TMA where the GPU has it)."""
    return lambda sorted_copy: monkeypatch.setattr(tiling, "use_sorted_copy", lambda *_: sorted_copy)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@PLAIN_AND_GATED
@SORTED_COPY
def test_nothing_waits_for_the_device(sorted_copy, gated, device, force_path):
    force_path(sorted_copy)
    step = Step(device, gated=gated)
    step()  # compiling a kernel may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@PLAIN_AND_GATED
@SORTED_COPY
def test_graph_of_forward_and_backward_replays_on_new_values(sorted_copy, gated, device, force_path):
    force_path(sorted_copy)
    step = Step(device, gated=gated)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):  # other values route other numbers of rows to each expert
        step.renew()
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in captured.items()}
        assert_bitwise_equal(replayed, step())


@SORTED_COPY
def test_kernels_run_on_the_current_stream(sorted_copy, device, force_path):
    force_path(sorted_copy)
    step = Step(device)
    expected = step()
    values = [leaf.detach().clone() for leaf in step.leaves]
    with torch.no_grad():
        for leaf in step.leaves:
            leaf.fill_(float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(200_000_000)  # a tenth of a second: a kernel on another stream would find NaN
        for leaf, value in zip(step.leaves, values, strict=True):
            leaf.copy_(value)
    with torch.cuda.stream(side):
        actual = step()
    torch.cuda.current_stream().wait_stream(side)
    assert_bitwise_equal(actual, expected)


def test_kernels_run_on_the_device_of_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = Step(torch.device("cuda", 0))
    other = Step(torch.device("cuda", 1))
    with torch.no_grad():
        for mine, theirs in zip(other.leaves + other.cotangents, expected.leaves + expected.cotangents, strict=True):
            mine.copy_(theirs)
    actual = {name: tensor.to("cuda:0") for name, tensor in other().items()}
    assert_bitwise_equal(actual, expected())


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_inductor_compiles_the_layer_whole(device):
    step = Step(device)
    expected = step()

    def forward(logits_TE, layer):
        routing = ck.topk_gating(logits_TE, 2)
        return ck.moe_mlp(weight_TK=routing.weight_TK, expert_TK=routing.expert_TK, activation="silu", **layer)

    y_TO = torch.compile(forward, fullgraph=True)(step.logits_TE, step.layer)
    grads = torch.autograd.grad(y_TO, list(step.layer.values()), step.cotangents[0])
    actual = {str(i): tensor.detach() for i, tensor in zip((0, *range(5, 5 + len(grads))), (y_TO, *grads), strict=True)}
    assert_bitwise_equal(actual, {name: expected[name] for name in actual})


def assert_uses(launches, flag, expected):
    """Every launch that may use a descriptor for its weights does, or none."""
    flags = {launched.meta[flag] for launched in launches if flag in launched.meta}
    assert flags == {expected}


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("activation", "gated"), [("gelu", False), ("quick_gelu", False), ("silu", True)], ids=["gelu", "clip", "swiglu"]
)
@pytest.mark.parametrize("T", [577, 4 * 577], ids=["gathered", "sorted-copy"])
def test_layer_at_the_widths_of_clip(T, activation, gated, dtype, device, gigabytes_free):
    gigabytes_free(16)
    layer = make_layer(device, T, 2, 4, 1024, 4096, 1024, gated=gated, dtype=dtype)
    with record_launches() as launches:
        assert_agrees("moe_mlp", layer, activation=activation, gated=gated)
    assert_uses(launches, "W_TMA", torch.cuda.get_device_capability() >= (9, 0))


@pytest.fixture(scope="module")
def mixtral():
    """The experts of one layer of Mixtral-8x7B, with random weights: 2.8 GB, and four times that in float64."""
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    torch.manual_seed(0)
    layer = make_layer(torch.device("cuda"), 1, 2, 8, 4096, 14336, 4096, gated=True, dtype=BF16)
    return {**layer, "b1_EF": None, "b2_EO": None}


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33, 64])
def test_decoding_at_the_widths_of_mixtral(T, mixtral, device):
    inputs = {
        "x_TD": torch.randn(T, 4096, device=device).to(BF16),
        "weight_TK": torch.rand(T, 2, device=device),
        "expert_TK": random_experts(T, 2, 8, device),
    }
    assert_agrees("moe_mlp", mixtral | inputs, wrt=[], activation="silu", gated=True)


@SORTED_COPY
def test_pre_activation_of_more_than_two_to_the_31_elements(sorted_copy, device, force_path, gigabytes_free):
    """Rows and columns at the far end are compared with the reference on those tokens, or those columns, alone."""
    gigabytes_free(48)
    force_path(sorted_copy)
    T, F = 70_000, 16_384
    layer = make_layer(device, T, 2, 8, 64, F, 64, dtype=BF16)
    assert T * 2 * F > 2**31
    dy_TO = torch.randn(T, 64, device=device).to(BF16)
    with ck.use_backend("triton"):
        actual = differentiate(ck.moe_mlp, layer, differentiable(layer), {"out": dy_TO})

    def compare(part, part_dy_TO, mine):
        wrt = differentiable(part)
        exact = differentiate(reference.moe_mlp, in_float64(part), wrt, {"out": part_dy_TO.double()})
        eager = differentiate(reference.moe_mlp, part, wrt, {"out": part_dy_TO})
        results = {name: mine.get(name, tensor) for name, tensor in eager.items()}
        assert_as_exact_as_eager(results, eager, exact, names=mine, rounded_to=BF16)

    # tokens whose rows stand first and last within an expert, and so first and last of all
    tokens = torch.tensor([0, 1, T // 2, T - 2, T - 1], device=device)
    per_token = {"x_TD": "dx_TD", "weight_TK": "dweight_TK"}
    few = {name: t[tokens] if name in (*per_token, "expert_TK") else t for name, t in layer.items()}
    compare(few, dy_TO[tokens], {name: actual[name][tokens] for name in ("out", *per_token.values())})
    # the gradients of some hidden columns' weights depend on no other column
    columns = {"w1_EFD": (..., slice(-64, None), slice(None)), "b1_EF": (..., slice(-64, None))}
    columns["w2_EOF"] = columns["b1_EF"]
    narrow = {name: layer[name][at] for name, at in columns.items()}
    compare(layer | narrow, dy_TO, {f"d{name}": actual[f"d{name}"][at] for name, at in columns.items()})
