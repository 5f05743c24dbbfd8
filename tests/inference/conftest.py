# SPDX-License-Identifier: Apache-2.0
"""A tiny random model as a folder and as a pipeline."""

import pytest

from cumo.inference import CuMoPipeline
from tests.inference.tiny import save_model


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
