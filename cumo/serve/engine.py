# SPDX-License-Identifier: Apache-2.0
"""What the endpoints share: the model with its queue, and what stands between a client and it."""

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
    """Of one application.

    Args:
        pipeline: prepares rows, and answers.
        scheduler: whose thread runs the model.
        reader: of pictures.
        limits: of a request.
        slots: places for requests.
        pool: threads for decoding and tokenizing.
    """

    pipeline: CuMoPipeline
    scheduler: Scheduler
    reader: ImageReader
    limits: Limits
    slots: Slots
    pool: Executor

    async def in_pool(self, work: Callable[..., T], *arguments: object) -> T:
        """The result of some work that would keep the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)


def parse_request(schema: type[Request], body: bytes) -> Request:
    """The request that a body holds.

    Raises:
        ApiError: it is no JSON, or no such request.
    """
    try:
        return schema.model_validate(parse_json(body))
    except ValidationError as error:
        raise ApiError(400, sentence(error)) from error
