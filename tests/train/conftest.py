# SPDX-License-Identifier: Apache-2.0
"""Models and data that several tests begin with, written once."""

import pytest

pytest.importorskip("transformers", reason="CuMo is built on transformers")
pytest.importorskip("accelerate", reason="Trainer needs it")
pytest.importorskip("PIL", reason="pictures are read by Pillow")

from pathlib import Path

from cumo.checkpoints.assemble import assemble_checkpoint
from cumo.checkpoints.upcycle import Upcycling, upcycle_checkpoint
from tests.train.tiny import write_data, write_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """An encoder and a language model."""
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="session")
def dense(parts, tmp_path_factory):
    """A model without experts."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    assemble_checkpoint(Path(parts["vision"]), Path(parts["text"]), folder, scales=parts["scales"])
    return str(folder)


@pytest.fixture(scope="session")
def sparse(dense, tmp_path_factory):
    """One with experts in encoder and connector."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    upcycle_checkpoint(Path(dense), folder, Upcycling(vision=4, connector=4, noise=0.5))
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of samples with two, one or no pictures."""
    return write_data(tmp_path_factory.mktemp("data"))
