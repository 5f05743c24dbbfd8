# SPDX-License-Identifier: Apache-2.0
"""A tiny random model as a folder and as a pipeline."""

from tests.inference.tiny import folder, pipeline

__all__ = ["folder", "pipeline"]
