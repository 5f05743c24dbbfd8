# SPDX-License-Identifier: Apache-2.0
"""CuMo: a multimodal LLM with co-upcycled Mixture-of-Experts (arXiv 2405.05949).

The names here are imported when they are first used, so that `cumo.nn` needs no transformers; the Auto classes of
transformers know CuMo's models all the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cumo.config import CuMoConfig, CuMoVisionConfig
    from cumo.models.cumo import CuMoForConditionalGeneration
    from cumo.models.processor import CuMoProcessor
    from cumo.models.vision import CuMoVisionModel

__version__ = "0.1.0"

_MODULE_OF = {
    "CuMoConfig": "cumo.config",
    "CuMoVisionConfig": "cumo.config",
    "CuMoForConditionalGeneration": "cumo.models.cumo",
    "CuMoProcessor": "cumo.models.processor",
    "CuMoVisionModel": "cumo.models.vision",
}

__all__ = [
    "CuMoConfig",
    "CuMoForConditionalGeneration",
    "CuMoProcessor",
    "CuMoVisionConfig",
    "CuMoVisionModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cumo' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def _register() -> None:
    from cumo.auto import register

    register()


_register()
