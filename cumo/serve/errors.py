# SPDX-License-Identifier: Apache-2.0
"""Errors in the form of OpenAI's API: a status, and a sentence that says what is wrong."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_FIELD = re.compile(r"^([A-Za-z_]\w*(?:\.\w+|\[\d+\])*): ")


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: a sentence for the client; if it begins with a field and a colon, that field becomes `param`.
        code: error code for programs.
        headers: extra headers of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """Return the body of the response in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        field = _FIELD.match(self.message)
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": field[1] if field else None,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """Return the response to send."""
        return JSONResponse(self.body(), self.status, self.headers)


def sentence(error: ValidationError) -> str:
    """Describe the first error of a request: "messages[0].role: ..., got 'x'"."""
    first = error.errors(include_url=False)[0]
    path = ""
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier():  # other steps are tags of a union
            path += f".{step}" if path else step
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{path}: expected it to be there, got nothing"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if first["type"] == "extra_forbidden":
        return f"{path}: unsupported field, got {shown}"
    return f"{path}: {message[0].lower()}{message[1:]}, got {shown}" if path else message
