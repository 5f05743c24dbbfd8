# SPDX-License-Identifier: Apache-2.0
"""Skips all of it where a package is missing that what is fuzzed needs."""

import pytest

pytest.importorskip("transformers", reason="CuMo is built on transformers")
pytest.importorskip("PIL", reason="pictures are read by Pillow")
