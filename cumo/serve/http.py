# SPDX-License-Identifier: Apache-2.0
"""HTTP below the endpoints: request bodies, event streams, clients that hang up, places for requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cumo.serve.errors import ApiError
from cumo.serve.limits import Limits

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up, so nobody reads an answer."""


class Slots:
    """Places for requests. A request that finds none free is told to try again later.

    Args:
        count: requests that may be in the server at once.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0

    def take(self) -> Ticket:
        """Take a place.

        Raises:
            ApiError: no place is free (status 429).
        """
        if self.taken >= self.count:
            raise ApiError(
                429,
                f"the server is busy with {self.taken} requests; try again soon",
                "overloaded",
                {"Retry-After": "1"},
            )
        self.taken += 1
        return Ticket(self)


class Ticket:
    """A place that is taken until it is released. Further calls of `release` have no effect."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    def release(self) -> None:
        """Free the place."""
        if self._slots is not None:
            self._slots.taken -= 1
            self._slots = None


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body of a JSON request.

    Raises:
        ApiError: the content type is not JSON, the body is too large, or it did not arrive in time.
        ClientGoneError: the client hung up.
    """
    # Requiring this content type stops other web pages from sending requests without this server's consent.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"expected Content-Type application/json, got {kind[:40]!r}")
    limit = limits.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:19]) > limit:
        raise ApiError(413, f"expected a body of up to {limit} bytes, got {announced[:19]}", "body_too_large")
    try:
        async with asyncio.timeout(limits.upload_seconds):
            return await _read(request.receive, limit)
    except TimeoutError as error:
        raise ApiError(408, f"expected the body within {limits.upload_seconds:g} seconds") from error


async def _read(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > limit:
            raise ApiError(413, f"expected a body of up to {limit} bytes, got more", "body_too_large")
        if not message.get("more_body", False):
            return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parse a JSON body.

    Raises:
        ApiError: `body` is not JSON.
    """

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body, parse_constant=no_constant)
    except RecursionError as error:
        raise ApiError(400, "the body is no JSON that can be read: it is nested too deep") from error
    except ValueError as error:  # includes bytes that are not UTF-8
        raise ApiError(400, f"the body is no JSON: {error}") from error


async def gone(receive: Receive) -> None:
    """Return once the client has hung up. Await it only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`, or cancel it if the client hangs up first.

    Raises:
        ClientGoneError: the client hung up.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        await _end(worker, watcher)


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, which end early if the client hangs up.

    Args:
        events: the encoded events to send.
        on_close: called at the end in every case.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the events."""
        try:
            with contextlib.suppress(ClientGoneError):
                await unless_gone(self._send(send), receive)
        finally:
            self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any) -> bytes:
    """Return a server-sent event that holds a JSON value, or a string as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
