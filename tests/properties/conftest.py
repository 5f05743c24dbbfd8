# SPDX-License-Identifier: Apache-2.0
"""The random cases poison memory for themselves, one case at a time, and so need what that fixture needs."""

import pytest

from tests.backends import backend

__all__ = ["backend"]


@pytest.fixture(autouse=True)
def _ready_for_poison(_compiler_knows_pytorch):
    pass
