# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in both layouts, to be copied before they are changed."""

import pytest
import torch

pytest.importorskip("transformers", reason="whole checkpoints are of models of transformers")

from cumo.checkpoints.convert import convert_to_published
from tests.models.tiny import tiny_model


@pytest.fixture(scope="session", params=["mistral", "mixtral"])
def native(request, tmp_path_factory):
    """Folder of a tiny random model in our layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("native") / request.param
    tiny_model(text_type=request.param).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published(native, tmp_path_factory):
    """The same model in the published layout."""
    folder = tmp_path_factory.mktemp("published") / native.name
    convert_to_published(native, folder)
    return folder
