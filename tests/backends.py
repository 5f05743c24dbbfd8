# SPDX-License-Identifier: Apache-2.0
"""The fixture for tests that hold on either backend; a `conftest.py` that imports it offers it to its folder."""

import importlib.util

import pytest

import cumo_kernels as ck


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    """The test runs on this backend, kernels in the interpreter where there is no GPU."""
    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    with ck.use_backend(request.param):
        yield request.param
