# SPDX-License-Identifier: Apache-2.0
"""What every request passes: whose host it names, whether it has the key; and what every response carries."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cumo.serve.errors import ApiError
from cumo.serve.metrics import Metrics

# The page itself and the state of the server hold nothing to protect.
OPEN = ("/", "/health")
ASSETS = "/assets/"
HEADERS = {
    # The page gets nothing from anywhere else, and cannot be shown within another one.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _UnsentError(Exception):
    """The connection takes no response any more."""


class Guard:
    """Middleware.

    Args:
        app: what is guarded.
        metrics: counts requests.
        paths: that the server knows, as labels of the metrics.
        api_key: without which nothing but the page and the state is answered; None if there is none.
        allowed_hosts: names under which the server may be asked, without ports; None for any. On a loopback address
            this keeps a web page from reaching the server under a name of its own that resolves to this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        paths: Collection[str],
        api_key: str | None = None,
        allowed_hosts: Collection[str] | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._key = None if api_key is None else api_key.encode()
        self._hosts = None if allowed_hosts is None else frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            try:
                await send(message)
            except Exception as error:
                raise _UnsentError from error

        try:
            refusal = self._refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except _UnsentError:
            pass  # what the client sent made its connection useless; that is no failure of the server
        finally:
            self._metrics.requests.labels(path, str(status or 500)).inc()
            self._metrics.request_seconds.labels(path).observe(time.monotonic() - begin)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts is not None and host_name(headers.get("host", "")) not in self._hosts:
            return ApiError(403, "this server is not to be asked under that name; see --allowed-host", "host_refused")
        if self._key is None or path in OPEN or path.startswith(ASSETS):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self._key):
            return None
        return ApiError(401, "expected the server's key as Authorization: Bearer KEY", "invalid_api_key")


def host_name(host: str) -> str:
    """Of a Host header, without port and in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
