# SPDX-License-Identifier: Apache-2.0
"""The real server on loopback, in a thread, with a tiny random model."""

import pytest

from tests.inference.tiny import folder, pipeline
from tests.serve.serving import serving

__all__ = ["client", "folder", "pipeline", "server"]


@pytest.fixture(scope="module")
def server(pipeline):
    """With the limits that it has by default."""
    with serving(pipeline) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    """The official client, unmodified."""
    with server.client() as client:
        yield client
