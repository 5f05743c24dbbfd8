# SPDX-License-Identifier: Apache-2.0
"""What examples of docstrings and documents need around them: a folder with a tiny model and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `checkpoint`, and `cat.png`."""
    pytest.importorskip("transformers", reason="the example uses transformers")
    from tests.inference.tiny import picture, save_model

    folder = tmp_path_factory.mktemp("example")
    save_model(folder / "checkpoint")
    picture().save(folder / "cat.png")
    return folder


@pytest.fixture
def in_example_folder(example_folder: Path) -> Iterator[Path]:
    """The same as working directory."""
    with chdir(example_folder):
        yield example_folder
