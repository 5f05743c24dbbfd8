# SPDX-License-Identifier: Apache-2.0
"""Answer with a trained model: one pipeline for scripts, the chat, the server and evaluation."""

from cumo.inference.options import Completion, GenerationOptions
from cumo.inference.pipeline import CuMoPipeline
from cumo.inference.routing import PictureRouting, picture_routing

__all__ = ["Completion", "CuMoPipeline", "GenerationOptions", "PictureRouting", "picture_routing"]
