# SPDX-License-Identifier: Apache-2.0
"""Lets transformers' Auto classes know CuMo after `import cumo`, without importing transformers before it is used.

Whatever registers itself with an Auto class does so where it is defined. Here these modules are imported as soon as
somebody else has imported the Auto class.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# module of transformers -> our modules that register with what it defines
REGISTRATIONS = {
    "transformers.models.auto.configuration_auto": ("cumo.config",),
    "transformers.models.auto.modeling_auto": ("cumo.models.vision", "cumo.models.cumo"),
    "transformers.models.auto.processing_auto": ("cumo.models.processor",),
}


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        _import_all(REGISTRATIONS[module.__name__])


class _AutoFinder(MetaPathFinder):
    """Finds the modules of `REGISTRATIONS`, once each; the file system knows where they are."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTRATIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _import_all(modules: Sequence[str]) -> None:
    """Import what registers itself. Where that is impossible, whoever imported transformers can still use it: they may
    want the layers of `cumo.nn` alone."""
    for name in modules:
        if name in sys.modules:  # one that is being imported now registers itself at its end
            continue
        try:
            importlib.import_module(name)
        except ImportError as error:
            warnings.warn(f"transformers' Auto classes do not know CuMo: {error}", stacklevel=2)


def register() -> None:
    """Register with the Auto classes that are there, and with the others once they are."""
    for module, ours in REGISTRATIONS.items():
        if module in sys.modules:
            _import_all(ours)
    if not any(isinstance(finder, _AutoFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoFinder())
