# SPDX-License-Identifier: Apache-2.0
"""Workloads: sizes and routings of layers, with their operations and the least bytes that they move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cumo_kernels.inspect import Case

SEED = 0
PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Workload:
    """A layer of the sizes of `case` with even or skewed routing; letters as in `cumo_kernels.types`."""

    case: Case
    skewed: bool = False
    """Choose expert e in proportion to 1 / (e + 1), as a router without a balance loss may; else evenly."""

    @property
    def name(self) -> str:
        """A unique name."""
        return self.case.name + (", skewed" if self.skewed else "")

    @property
    def up_width(self) -> int:
        """Rows of an expert's up projection."""
        return self.case.F * (2 if self.case.gated else 1)

    @property
    def rows(self) -> int:
        """N = T K."""
        return self.case.T * self.case.K

    def expert_choice(self, generator: torch.Generator) -> Tensor:
        """Expert ids [T, K], int32, distinct within a token; the strongest first."""
        case = self.case
        share_E = 1.0 / torch.arange(1, case.E + 1) if self.skewed else torch.ones(case.E)
        gumbel_TE = -torch.empty(case.T, case.E).exponential_(generator=generator).log()
        return (share_E.log() + gumbel_TE).topk(case.K, dim=1).indices.int()

    def layer_flops(self, which: str) -> int:
        """Multiplications and additions of the matrix products; a backward has twice those of its forward."""
        case = self.case
        forward = 2 * self.rows * (case.D * self.up_width + case.F * case.O)
        return forward * {"forward": 1, "backward": 2, "both": 3}[which]

    def layer_bytes(self, which: str, itemsize: int) -> int:
        """The least bytes to move: each input is read and each output written once, and experts without tokens are not
        read. In training the forward also writes the pre-activation, and the backward reads it."""
        case = self.case
        experts = min(case.E, self.rows)
        weights = experts * (self.up_width * case.D + case.O * case.F + case.bias * (self.up_width + case.O))
        tokens, saved = case.T * (case.D + case.O), self.rows * self.up_width
        forward = weights + tokens + (saved if which == "both" else 0)
        backward = 2 * weights + tokens + case.T * case.D + saved  # reads x, dy, z, weights; writes dx, dweights
        return itemsize * {"forward": forward, "backward": backward, "both": forward + backward}[which]


def _clip(images: int) -> Case:
    name = f"CLIP-MoE, both scales, {images} image{'s' if images > 1 else ''}"
    return Case(name, images * 10 * 577, 2, 4, 1024, 4096, 1024, "quick_gelu", False, True, 577)


def _connector(images: int) -> Case:
    return Case(f"connector, {images} images", images * 576, 2, 4, 2048, 4096, 4096, "gelu", False, True, 576)


def _mixtral(tokens: int) -> Case:
    name = f"Mixtral, {tokens} token{'s' if tokens > 1 else ''}"
    return Case(name, tokens, 2, 8, 4096, 14336, 4096, "silu", True, False, None)


# As others publish them: Liger-Kernel's E = 128 (H 2048, I 768, K 8), OLMoE's E = 64 (H 2048, I 1024, K 8).
FINE_128 = Case("128 experts, 8 per token", 32768, 8, 128, 2048, 768, 2048, "silu", True, False, None)
FINE_64 = Case("64 experts, 8 per token", 16384, 8, 64, 2048, 1024, 2048, "silu", True, False, None)

GPU = (
    *(Workload(_clip(images)) for images in (1, 4, 8, 32)),
    Workload(_clip(4), skewed=True),
    *(Workload(_connector(images)) for images in (4, 32)),
    *(Workload(_mixtral(tokens)) for tokens in (1, 8, 64, 4096, 8192)),
    Workload(_mixtral(4096), skewed=True),
    Workload(FINE_64),
    Workload(FINE_128),
    Workload(FINE_128, skewed=True),
)


def _narrowed(case: Case, by: int, T: int | None = None) -> Case:
    """The same layer with all widths divided, small enough for a CPU."""
    name = f"{case.name}, width / {by}" if T is None else f"{case.name}, {T} of the tokens, width / {by}"
    return case._replace(name=name, T=T or case.T, D=case.D // by, F=case.F // by, O=case.O // by)


CPU = (
    Workload(_narrowed(_clip(1), 8)),
    Workload(_narrowed(_clip(1), 8), skewed=True),
    Workload(_narrowed(_connector(4), 8)),
    Workload(_narrowed(_mixtral(1), 8)),
    Workload(_narrowed(_mixtral(64), 16)),
    Workload(_narrowed(FINE_64, 16, T=1024)),
    Workload(_narrowed(FINE_128, 16, T=1024), skewed=True),
)


@dataclass
class LayerInputs:
    """The tensors of a layer. `leaves` are those that get gradients."""

    workload: Workload
    x_TD: Tensor
    weight_TK: Tensor
    expert_TK: Tensor
    w1_EFD: Tensor
    w2_EOF: Tensor
    b1_EF: Tensor | None
    b2_EO: Tensor | None
    dy_TO: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """In a fixed order, without absent biases."""
        tensors = (self.x_TD, self.weight_TK, self.w1_EFD, self.w2_EOF, self.b1_EF, self.b2_EO)
        return [tensor for tensor in tensors if tensor is not None]

    def to(self, dtype: torch.dtype, tokens: int | None = None) -> LayerInputs:
        """Detached copies in another dtype, of the first `tokens` tokens."""

        def copied(tensor: Tensor | None, rows: int | None = None) -> Tensor | None:
            return None if tensor is None else tensor.detach()[:rows].to(dtype).requires_grad_(tensor.requires_grad)

        names = ("x_TD", "weight_TK", "dy_TO")
        cut = {name: copied(getattr(self, name), tokens) for name in names}
        whole = {name: copied(getattr(self, name)) for name in ("w1_EFD", "w2_EOF", "b1_EF", "b2_EO")}
        return replace(self, expert_TK=self.expert_TK[:tokens], **cut, **whole)  # type: ignore[arg-type]

    def with_up_projection(self, w1_EFD: Tensor) -> LayerInputs:
        """The same inputs with other up projections."""
        return replace(self, w1_EFD=w1_EFD)


def make_layer(workload: Workload, dtype: torch.dtype, device: torch.device) -> LayerInputs:
    """Random inputs, the same for every variant, with values of order one, as after a layer norm."""
    case, generator = workload.case, torch.Generator().manual_seed(SEED)
    on_device = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        tensor = torch.randn(shape, generator=on_device, device=device, dtype=torch.float32)
        return (tensor * scale).to(dtype).requires_grad_(grad)

    weight_TK = torch.rand(case.T, case.K, generator=generator)
    return LayerInputs(
        workload,
        x_TD=normal(case.T, case.D),
        weight_TK=(weight_TK / weight_TK.sum(dim=1, keepdim=True)).to(device, dtype).requires_grad_(),
        expert_TK=workload.expert_choice(generator).to(device),
        w1_EFD=normal(case.E, workload.up_width, case.D, scale=case.D**-0.5),
        w2_EOF=normal(case.E, case.O, case.F, scale=case.F**-0.5),
        b1_EF=normal(case.E, workload.up_width, scale=0.1) if case.bias else None,
        b2_EO=normal(case.E, case.O, scale=0.1) if case.bias else None,
        dy_TO=normal(case.T, case.O, grad=False),
    )
