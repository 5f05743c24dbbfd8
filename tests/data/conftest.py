# SPDX-License-Identifier: Apache-2.0
"""A processor and data files for tests of moments."""

import pytest

pytest.importorskip("transformers", reason="CuMo is built on transformers")
pytest.importorskip("PIL", reason="pictures are read by Pillow")

from tests.data.samples import Files, byte_processor


@pytest.fixture(scope="session")
def processor():
    """A processor whose tokens are bytes, for which nothing has to be installed; four placeholders a picture."""
    return byte_processor()


@pytest.fixture
def files(tmp_path):
    """Writes data files and pictures into a folder."""
    return Files(tmp_path)
