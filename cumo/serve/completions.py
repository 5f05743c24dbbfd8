# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/chat/completions`: turn a request into rows, and their text into a response or a stream of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cumo.inference.features import PreparedPicture
from cumo.inference.options import Completion, GenerationOptions
from cumo.inference.rows import Row
from cumo.serve.engine import Engine, parse_request
from cumo.serve.errors import ApiError
from cumo.serve.http import EventStream, Ticket, event, read_body, unless_gone
from cumo.serve.metrics import Metrics
from cumo.serve.scheduler import Job
from cumo.serve.schemas import ChatRequest, ImagePart

logger = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 15.0


class Event(NamedTuple):
    """One event of a choice: a piece of text, its end or an error."""

    choice: int
    piece: str | None = None
    """Piece of the answer's text; None if the choice has ended."""
    error: Exception | None = None


class Answer:
    """The choices of one request. Carries their events from the model's thread to the event loop."""

    def __init__(self, request: ChatRequest, model_id: str, ticket: Ticket, metrics: Metrics) -> None:
        self.request = request
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.rows: list[Row] = []
        self._ticket = ticket
        self._metrics = metrics
        self._model_id = model_id
        self._loop = asyncio.get_running_loop()
        self._begin = time.monotonic()
        self._created = int(time.time())
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._ended = 0
        self._said = False

    def say(self, choice: int, piece: str) -> None:
        """Add a piece of a choice's text. Called from the model's thread, like `end` and `fail`."""
        self._tell(Event(choice, piece))

    def end(self, choice: int) -> None:
        """Mark a choice as ended."""
        self._tell(Event(choice))

    def fail(self, choice: int, error: Exception) -> None:
        """Mark a choice as failed with `error`."""
        self._tell(Event(choice, error=error))

    def _tell(self, happened: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the server is stopping
            self._loop.call_soon_threadsafe(self._take, happened)

    def _take(self, happened: Event) -> None:
        if happened.piece is not None and not self._said:
            self._said = True
            self._metrics.first_token_seconds.observe(time.monotonic() - self._begin)
        if happened.piece is None:
            self._ended += 1
            if happened.error is None:
                self._count(self.rows[happened.choice].completion())
            if self._ended == len(self.rows):
                # The rest does not need the model, however slowly the client reads.
                self._ticket.release()
        self.events.put_nowait(happened)

    def _count(self, completion: Completion) -> None:
        if completion.finish_reason != "cancelled":
            self._metrics.prompt_tokens.inc(completion.prompt_tokens)
        self._metrics.completion_tokens.inc(completion.completion_tokens)
        self._metrics.completions.labels(completion.finish_reason).inc()

    def close(self) -> None:
        """Cancel the choices that are still running."""
        for row in self.rows:
            row.cancel()
        self._ticket.release()

    async def whole(self) -> dict[str, Any]:
        """Return the response once every choice has ended.

        Raises:
            ApiError: the model failed.
        """
        left = len(self.rows)
        while left:
            happened = await self.events.get()
            if happened.error is not None:
                raise _failed(happened.error)
            left -= happened.piece is None
        completions = [row.completion() for row in self.rows]
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": None,
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._object("chat.completion", choices) | {"usage": _usage(completions)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events."""
        options = self.request.stream_options
        with_usage = options is not None and options.include_usage
        for index in range(len(self.rows)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None)
        left = len(self.rows)
        while left:
            try:
                # Not `wait_for`: in Python 3.11 it loses a cancellation that coincides with an event.
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    happened = await self.events.get()
            except TimeoutError:
                yield b": the answer is waiting for its turn\n\n"
                continue
            if happened.error is not None:
                yield event(_failed(happened.error).body())
                return
            if happened.piece is not None:
                yield self._chunk(happened.choice, {"content": happened.piece}, None)
                continue
            left -= 1
            yield self._chunk(happened.choice, {}, self.rows[happened.choice].completion().finish_reason)
        if with_usage:
            usage = _usage([row.completion() for row in self.rows])
            yield event(self._object("chat.completion.chunk", []) | {"usage": usage})
        yield event("[DONE]")

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event(self._object("chat.completion.chunk", [choice]))

    def _object(self, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model_id,
            "choices": choices,
        }


def _usage(completions: list[Completion]) -> dict[str, int]:
    prompt, answer = completions[0].prompt_tokens, sum(each.completion_tokens for each in completions)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _failed(error: Exception) -> ApiError:
    return ApiError(500, f"the model failed on this request ({type(error).__name__}); the server goes on")


class ChatCompletions:
    """The endpoint `/v1/chat/completions`.

    Args:
        engine: the parts that all endpoints share.
        model_id: name of the model in requests and responses.
        metrics: the server's counters.
    """

    def __init__(self, engine: Engine, model_id: str, metrics: Metrics) -> None:
        self._engine = engine
        self._model_id = model_id
        self._metrics = metrics

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            ApiError: the request cannot be answered.
            ClientGoneError: the client hung up.
        """
        ticket = self._engine.slots.take()
        answer: Answer | None = None
        streams = False
        try:
            body = await read_body(request, self._engine.limits)
            answer = await unless_gone(self._begin(body, ticket), request.receive)
            streams = bool(answer.request.stream)
            if streams:
                return EventStream(answer.chunks(), answer.close)
            return JSONResponse(await unless_gone(answer.whole(), request.receive))
        finally:
            if answer is not None and not streams:
                answer.close()
            elif answer is None:
                ticket.release()

    async def _begin(self, body: bytes, ticket: Ticket) -> Answer:
        """Check the request, prepare its rows outside the event loop, and queue them."""
        request = await self._engine.in_pool(self._parse, body)
        answer = Answer(request, self._model_id, ticket, self._metrics)
        answer.rows = await self._engine.in_pool(self._rows, answer)
        for index, row in enumerate(answer.rows):
            self._engine.scheduler.submit(Job(row, partial(answer.fail, index)))
        return answer

    def _parse(self, body: bytes) -> ChatRequest:
        request = parse_request(ChatRequest, body)
        limits = self._engine.limits
        if request.model not in (None, self._model_id):
            raise ApiError(
                404, f"model: expected {self._model_id!r}, got {str(request.model)[:80]!r}", "model_not_found"
            )
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        texts = [message.content for message in request.messages if isinstance(message.content, str)]
        texts += [part.text for part in parts if not isinstance(part, ImagePart)]
        for name, limit, given in (
            ("messages", limits.max_messages, len(request.messages)),
            ("messages (pictures)", limits.max_images, sum(isinstance(part, ImagePart) for part in parts)),
            ("messages (bytes of text)", limits.max_text_bytes, sum(len(text.encode()) for text in texts)),
            ("max_tokens", limits.max_tokens, request.token_limit or 0),
            ("n", limits.max_choices, request.n or 0),
        ):
            if given > limit:
                raise ApiError(400, f"{name}: expected up to {limit}, got {given}")
        return request

    def _rows(self, answer: Answer) -> list[Row]:
        request = answer.request
        conversation = self._conversation(request)
        rows = []
        for index in range(request.n or 1):
            try:
                options = GenerationOptions(
                    max_new_tokens=request.token_limit or self._engine.limits.default_tokens,
                    temperature=1.0 if request.temperature is None else request.temperature,
                    top_p=1.0 if request.top_p is None else request.top_p,
                    stop=request.stop or (),
                    seed=None if request.seed is None else (request.seed + index) % 2**63,
                )
                row = self._engine.pipeline.prepare(
                    conversation,
                    options,
                    partial(answer.say, index),
                    partial(answer.end, index),
                )
            except ValueError as error:
                code = "context_length_exceeded" if "tokens of the model" in str(error) else None
                raise ApiError(400, str(error), code) from error
            tokens, limit = len(row.prompt_ids) + row.max_new_tokens, self._engine.limits.max_batch_tokens
            if tokens > limit:
                raise ApiError(400, f"messages: expected up to {limit} tokens with the answer, got {tokens}")
            rows.append(row)
        return rows

    def _conversation(self, request: ChatRequest) -> list[dict[str, Any]]:
        """Return the messages in the pipeline's form. Pictures are prepared for the encoder, their pixels released."""
        conversation = []
        for number, message in enumerate(request.messages):
            content: Any = message.content
            if not isinstance(content, str):
                content = [
                    {"type": "text", "text": part.text}
                    if not isinstance(part, ImagePart)
                    else {"type": "image", "image": self._picture(part, f"messages[{number}].content[{index}]")}
                    for index, part in enumerate(content)
                ]
            role = "system" if message.role == "developer" else message.role
            conversation.append({"role": role, "content": content})
        return conversation

    def _picture(self, part: ImagePart, name: str) -> PreparedPicture:
        picture = self._engine.reader.read(part.image_url.url, f"{name}.image_url")
        try:
            return self._engine.pipeline.prepare_picture(picture)
        except ValueError as error:  # too elongated for a model that does not pad
            raise ApiError(400, f"{name}.image_url: {error}") from error
