# SPDX-License-Identifier: Apache-2.0
"""What the endpoints share: the pipeline with its queue, and the checks on a client's request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from cumo.inference.pipeline import CuMoPipeline
from cumo.serve.errors import ApiError, sentence
from cumo.serve.http import Slots, parse_json
from cumo.serve.images import ImageReader
from cumo.serve.limits import Limits
from cumo.serve.scheduler import Scheduler

T = TypeVar("T")
Request = TypeVar("Request", bound=BaseModel)


@dataclass(frozen=True)
class Engine:
    """The shared parts of one application.

    Args:
        pipeline: the pipeline that prepares rows and answers.
        scheduler: the scheduler whose thread runs the model.
        reader: reader of clients' pictures.
        limits: upper limits of a request.
        slots: places for requests in the server.
        pool: threads that decode pictures and tokenise text.
    """

    pipeline: CuMoPipeline
    scheduler: Scheduler
    reader: ImageReader
    limits: Limits
    slots: Slots
    pool: Executor

    async def in_pool(self, work: Callable[..., T], *arguments: object) -> T:
        """Run `work` in the thread pool, so that it does not block the event loop, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)


def parse_request(schema: type[Request], body: bytes) -> Request:
    """Parse a request body.

    Raises:
        ApiError: `body` is not JSON, or does not fit `schema`.
    """
    try:
        return schema.model_validate(parse_json(body))
    except ValidationError as error:
        raise ApiError(400, sentence(error)) from error
