# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring of `cumo_kernels` gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import cumo_kernels

MODULES = ["cumo_kernels", *(m.name for m in pkgutil.walk_packages(cumo_kernels.__path__, "cumo_kernels."))]


@pytest.fixture
def poisoned_memory():
    """None: an example is run as a reader would."""


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("cumo_kernels.kernels")])
def test_examples_are_right(name):
    failures, _ = doctest.testmod(importlib.import_module(name))
    assert failures == 0


def test_there_are_examples():
    attempted = sum(doctest.testmod(importlib.import_module(name)).attempted for name in ("cumo_kernels",))
    attempted += doctest.testmod(importlib.import_module("cumo_kernels.types")).attempted
    assert attempted >= 8
