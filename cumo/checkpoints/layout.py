# SPDX-License-Identifier: Apache-2.0
"""Convert experts between the published layout and stacked parameters.

Published checkpoints keep each expert apart, in `nn.ModuleList`s; `cumo.nn.MoEMLP` stacks them. Only this module
knows the published form, as tables. Its functions map dictionaries of tensors to dictionaries of tensors, bit for bit.
They never change their arguments, and what they convert shares no memory with its source.

`stack_experts` and `unstack_experts` convert one MLP, and `published_styles` and `stacked_styles` find the MLPs by the
keys alone; `stacked_tensors` and `unstacked_tensors` convert a whole checkpoint as a stream, `stack_state_dict` and
`unstack_state_dict` as a dictionary.
Letters: E experts, D input, F hidden, O output width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cumo_kernels.checks import check_one_of, check_shapes

GATE = "gate.weight"


class Source(NamedTuple):
    """Published tensors that a stacked parameter is made of."""

    names: tuple[str, ...]
    """Names of one expert's tensors, whose rows are concatenated."""
    shape: str
    """Shape of each of these tensors."""


# For each style: stacked parameter -> tensors of `experts.{i}.`
STYLES: dict[str, dict[str, Source]] = {
    # MLPMoE of the connector: nn.Sequential(Linear, GELU, Linear)
    "connector": {
        "up_proj": Source(("0.weight",), "F D"),
        "up_proj_bias": Source(("0.bias",), "F"),
        "down_proj": Source(("2.weight",), "O F"),
        "down_proj_bias": Source(("2.bias",), "O"),
    },
    # CLIPMLP of the vision encoder
    "clip": {
        "up_proj": Source(("fc1.weight",), "F D"),
        "up_proj_bias": Source(("fc1.bias",), "F"),
        "down_proj": Source(("fc2.weight",), "O F"),
        "down_proj_bias": Source(("fc2.bias",), "O"),
    },
    # Mixtral: w2(silu(w1 x) * (w3 x))
    "mixtral": {
        "up_proj": Source(("w1.weight", "w3.weight"), "F D"),
        "down_proj": Source(("w2.weight",), "O F"),
    },
}

# Published names of the modules that hold `gate` and `experts`, and their style.
MODULE_STYLES = (
    (re.compile(r"(?:.*\.)?mm_projector"), "connector"),
    (re.compile(r"(?:.*\.)?encoder\.layers\.\d+"), "clip"),
    (re.compile(r"(?:.*\.)?block_sparse_moe"), "mixtral"),
)

_EXPERT_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)experts\.\d+\.(?P<name>.+)")
_STACKED_KEY = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<name>up_proj|up_proj_bias|down_proj|down_proj_bias)")


def stack_experts(tensors: Mapping[str, Tensor], style: str) -> dict[str, Tensor]:
    """Convert the published tensors of one MLP to the parameters of one `MoEMLP`.

    Args:
        tensors: `gate.weight` [E, D], and `experts.{i}.{name}` for i in 0..E-1 and every name of the style; nothing
            else. For each name, all experts' tensors have one dtype.
        style: a key of `STYLES`.

    Returns:
        `gate.weight`, `up_proj` and so on, in the dtypes given.

    Raises:
        ValueError: `style` is unknown, or tensors are missing (the gate has a row for each expert), left over, or of
            another shape or dtype than those of expert 0.

    Examples:
        >>> import torch
        >>> expert = {"fc1.weight": (16, 8), "fc1.bias": (16,), "fc2.weight": (8, 16), "fc2.bias": (8,)}
        >>> tensors = {f"experts.{i}.{name}": torch.randn(shape) for i in range(4) for name, shape in expert.items()}
        >>> stacked = stack_experts({"gate.weight": torch.randn(4, 8), **tensors}, "clip")
        >>> {name: tuple(tensor.shape) for name, tensor in stacked.items() if name.endswith("proj")}
        {'up_proj': (4, 16, 8), 'down_proj': (4, 8, 16)}
        >>> bool((unstack_experts(stacked, "clip")["experts.3.fc1.weight"] == tensors["experts.3.fc1.weight"]).all())
        True
    """
    check_one_of("style", style, STYLES)
    if GATE not in tensors:
        raise ValueError(f"tensors: expected {GATE} among them, got {sorted(tensors)}")
    num_experts = check_shapes(**{GATE: (tensors[GATE], "E D")})["E"]
    shapes = {name: source.shape for source in STYLES[style].values() for name in source.names}
    keys = {f"experts.{i}.{name}" for i in range(num_experts) for name in shapes}
    _check_keys(tensors, {GATE, *keys}, f"{num_experts} experts (rows of {GATE}) in style {style!r}")
    _check_alike(tensors, num_experts, shapes)
    check_shapes(
        **{GATE: (tensors[GATE], "E D")},
        **{f"experts.0.{name}": (tensors[f"experts.0.{name}"], shape) for name, shape in shapes.items()},
    )
    stacked = {GATE: tensors[GATE].clone()}
    for parameter, source in STYLES[style].items():
        rows = [tensors[f"experts.{i}.{name}"] for i in range(num_experts) for name in source.names]
        stacked[parameter] = torch.cat(rows).unflatten(0, (num_experts, -1))
    return stacked


def unstack_experts(tensors: Mapping[str, Tensor], style: str) -> dict[str, Tensor]:
    """Convert the parameters of one `MoEMLP` to the published tensors of one MLP: the inverse of `stack_experts`.

    Args:
        tensors: `gate.weight` [E, D] and the stacked parameters of the style; nothing else.
        style: a key of `STYLES`.

    Returns:
        `gate.weight` and `experts.{i}.{name}`, each contiguous, in the dtypes given.

    Raises:
        ValueError: `style` is unknown, or tensors are missing, left over or of shapes that do not fit one another.
    """
    check_one_of("style", style, STYLES)
    _check_keys(tensors, {GATE, *STYLES[style]}, f"the parameters of an MoE MLP in style {style!r}")
    patterns = {GATE: (tensors[GATE], "E D")}
    pieces: dict[str, Tensor] = {}  # [E, rows, ...] by the name of their rows
    for parameter, (names, shape) in STYLES[style].items():
        tensor = tensors[parameter]
        if tensor.dim() < 2 or tensor.shape[1] % len(names):
            raise ValueError(
                f"{parameter}: expected shape [E {shape}] with the rows of {' and '.join(names)}, "
                f"got {list(tensor.shape)}"
            )
        for name, piece in zip(names, tensor.chunk(len(names), dim=1), strict=True):
            pieces[name] = piece
            patterns[f"{parameter} (rows of {name})"] = (piece, f"E {shape}")
    size = check_shapes(**patterns)
    published = {GATE: tensors[GATE].clone()}
    for i in range(size["E"]):
        for name, piece in pieces.items():
            published[f"experts.{i}.{name}"] = piece[i].clone(memory_format=torch.contiguous_format)
    return published


def _check_keys(actual: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raise a `ValueError` that lists the missing and the superfluous keys."""
    actual, expected = set(actual), set(expected)
    faults = [
        f"{kind} {', '.join(sorted(keys))}"
        for kind, keys in (("missing", expected - actual), ("unexpected", actual - expected))
        if keys
    ]
    if faults:
        raise ValueError(f"tensors: expected {what}; {'; '.join(faults)}")


def _check_alike(tensors: Mapping[str, Tensor], num_experts: int, names: Iterable[str]) -> None:
    """Raise a `ValueError` that lists the tensors whose shape or dtype differs from expert 0's."""
    faults = []
    for name in names:
        first = tensors[f"experts.0.{name}"]
        for key in (f"experts.{i}.{name}" for i in range(num_experts)):
            tensor = tensors[key]
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                faults.append(
                    f"{key}: expected {first.dtype} {list(first.shape)} as expert 0, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
    if faults:
        raise ValueError("; ".join(faults))


def published_styles(keys: Iterable[str]) -> dict[str, str]:
    """Prefix (with its dot) -> style of every MLP whose experts' keys, `{prefix}experts.{i}.{name}`, are among `keys`.

    Raises:
        ValueError: the names of some experts' tensors fit no style, or several.
    """
    names: dict[str, set[str]] = {}
    for key in keys:
        if match := _EXPERT_KEY.fullmatch(key):
            names.setdefault(match["prefix"], set()).add(match["name"])
    return {prefix: _style_of_names(prefix, found) for prefix, found in names.items()}


def _style_of_names(prefix: str, found: set[str]) -> str:
    known = {style: [name for source in STYLES[style].values() for name in source.names] for style in STYLES}
    for style, names in known.items():
        if found <= set(names):
            return style
    raise ValueError(f"{prefix}experts: expected names of one style out of {known}, got {sorted(found)}")


def stacked_styles(keys: Iterable[str]) -> dict[str, str]:
    """Prefix (with its dot) -> style of every MLP whose stacked parameters, `{prefix}up_proj` etc., are among `keys`.

    The stacked parameters do not show their style; the module does, by its published name (`MODULE_STYLES`).

    Raises:
        ValueError: the name of a module tells no style.
    """
    prefixes = dict.fromkeys(match["prefix"] for key in keys if (match := _STACKED_KEY.fullmatch(key)))
    styles = {}
    for prefix in prefixes:
        fitting = [style for pattern, style in MODULE_STYLES if pattern.fullmatch(prefix.removesuffix("."))]
        if not fitting:
            expected = [pattern.pattern for pattern, _ in MODULE_STYLES]
            raise ValueError(f"styles: none given for {prefix!r}, and its name is none of the published: {expected}")
        styles[prefix] = fitting[0]
    return styles


def stacked_tensors(state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of `state_dict`, with every published MoE MLP replaced by stacked parameters.

    Tensors are looked up one by one, those of one MLP together, so that `state_dict` may read files. All other tensors
    come first, unchanged and not copied.

    Raises:
        ValueError: see `published_styles` and `stack_experts`; the message begins with the prefix.
    """
    return _converted(state_dict, published_styles(state_dict), _EXPERT_KEY, stack_experts)


def unstacked_tensors(
    state_dict: Mapping[str, Tensor], styles: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) with stacked parameters converted to published tensors: the inverse of `stacked_tensors`.

    Args:
        state_dict: holds stacked parameters under prefixes.
        styles: prefix (with its dot) -> style of the MLPs to convert, as `published_styles` found them; None converts
            all, with the styles that `stacked_styles` finds.

    Raises:
        ValueError: see `stacked_styles` and `unstack_experts`; the message begins with the prefix.
    """
    styles = stacked_styles(state_dict) if styles is None else styles
    return _converted(state_dict, styles, _STACKED_KEY, unstack_experts)


def stack_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `stacked_tensors` as a dictionary."""
    return dict(stacked_tensors(state_dict))


def unstack_state_dict(state_dict: Mapping[str, Tensor], styles: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Return `unstacked_tensors` as a dictionary."""
    return dict(unstacked_tensors(state_dict, styles))


def _converted(
    state_dict: Mapping[str, Tensor],
    styles: Mapping[str, str],
    pattern: re.Pattern[str],
    convert: Callable[[Mapping[str, Tensor], str], dict[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """Convert, for each prefix in `styles`, its gate and its keys that match `pattern`; pass the others on."""
    groups: dict[str, list[str]] = {prefix: [] for prefix in styles}
    for key in state_dict:
        match = pattern.fullmatch(key)
        prefix = match["prefix"] if match else key.removesuffix(GATE)
        if prefix in groups:
            groups[prefix].append(key)
        else:
            yield key, state_dict[key]
    for prefix, keys in groups.items():
        try:
            converted = convert({key.removeprefix(prefix): state_dict[key] for key in keys}, styles[prefix])
        except ValueError as error:
            raise ValueError(f"{prefix}: {error}") from error
        yield from ((prefix + key, tensor) for key, tensor in converted.items())
