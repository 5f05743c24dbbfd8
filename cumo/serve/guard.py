# SPDX-License-Identifier: Apache-2.0
"""Checks on every request (host name, API key), and headers of every response."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cumo.serve.errors import ApiError
from cumo.serve.metrics import Metrics

# The page and the health endpoint reveal nothing that needs a key.
OPEN = ("/", "/health")
ASSETS = "/assets/"
HEADERS = {
    # The page may load nothing from other hosts, and no other page may embed it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _UnsentError(Exception):
    """The connection no longer accepts a response."""


class Guard:
    """Middleware that checks the host name and the key, counts requests and adds security headers.

    Args:
        app: the application behind it.
        metrics: the server's counters.
        paths: paths of the server, used as labels of the metrics.
        api_key: the key that every request needs, except those for the page and the health endpoint; None if no key is
            needed.
        allowed_hosts: names under which clients may address the server, without ports; None for any. On a loopback
            address this keeps out a web page whose own host name resolves to this machine.
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
        """Check the request, pass it on and count it."""
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
            pass  # the client broke the connection; the server did not fail
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
    """Return the name in a Host header, without port and in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
