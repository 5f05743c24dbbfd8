# SPDX-License-Identifier: Apache-2.0
"""The real server on loopback, in a thread, with a tiny random model."""

import pytest

from cumo.inference import CuMoPipeline
from tests.inference.tiny import save_model
from tests.serve.serving import serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint with its processor."""
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


@pytest.fixture(scope="session")
def pipeline(folder):
    """Loaded from the folder."""
    return CuMoPipeline.from_pretrained(folder, device="cpu")


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
