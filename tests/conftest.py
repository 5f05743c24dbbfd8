# SPDX-License-Identifier: Apache-2.0
"""Where the tests run, and in what state each of them starts.

With a CUDA device the kernels run on it. Without one, or with TRITON_INTERPRET=1 in the environment, they run in
Triton's CPU interpreter, which must be chosen before anything imports Triton: kernels are decorated at import.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from cumo_kernels.backend import interpreted
from tests.poison import poisoned, untouched

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
ON_GPU = torch.cuda.is_available() and not interpreted()

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
# `--hypothesis-profile=thorough`: other cases each time, CUMO_EXAMPLES of each test.
EXAMPLES = int(os.environ.get("CUMO_EXAMPLES", "2000"))
hypothesis.settings.register_profile("thorough", max_examples=EXAMPLES, derandomize=False, deadline=None, database=None)
hypothesis.settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none to run on."""
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and TRITON_INTERPRET unset")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels can run."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def _compiler_knows_pytorch() -> None:
    """Dynamo notes which functions are PyTorch's when it first compiles, and `with torch.device` which ones take a
    device; neither must take patched ones for them."""
    torch.compile(torch.empty_like, backend="eager")(torch.zeros(1))
    with torch.device("cpu"):
        torch.zeros(1)


@pytest.fixture
def poisoned_memory(_compiler_knows_pytorch: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN, or an integer far out of range, and lies between guards that nobody may write to.

    Fresh memory often happens to be zero, and what lies around it to be one's own: a kernel that reads what it did
    not write, or that reaches past an end, would then pass.
    """
    guards: list[torch.Tensor] = []
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name), guards))
    yield
    assert untouched(guards), "something wrote past an end of its memory"
