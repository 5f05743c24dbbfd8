# SPDX-License-Identifier: Apache-2.0
"""Lets the reference show the fields of configurations as arguments, which transformers makes of them at run time."""

from __future__ import annotations

from typing import Any

from griffe import Class, Extension, Function, Parameter, ParameterKind, Parameters

BASE = "PreTrainedConfig"


class ConfigurationFields(Extension):
    """Gives subclasses of `PreTrainedConfig` the constructor of a dataclass."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        """Add it, once the fields are known."""
        if not any(str(base) == BASE for base in cls.bases):
            return
        fields = [
            Parameter(name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)
            for name, field in cls.attributes.items()
            if field.annotation is not None and "property" not in field.labels
        ]
        function = Function("__init__", parameters=Parameters(Parameter("self"), *fields))
        cls.set_member("__init__", function)
