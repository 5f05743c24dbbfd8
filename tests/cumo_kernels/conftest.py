# SPDX-License-Identifier: Apache-2.0
"""Every test of the kernels runs on poisoned memory; a module that cannot overrides the fixture `poisoned_memory`."""

import pytest


@pytest.fixture(autouse=True)
def _poison(poisoned_memory):
    pass
