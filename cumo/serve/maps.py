# SPDX-License-Identifier: Apache-2.0
"""`POST /cumo/routing`: which experts the patches of a picture were sent to."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import torch
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cumo.inference.routing import ExpertMaps, PictureRouting, picture_routing
from cumo.serve.engine import Engine, parse_request
from cumo.serve.errors import ApiError
from cumo.serve.http import read_body, unless_gone
from cumo.serve.schemas import RoutingRequest


def encoded(maps: ExpertMaps) -> dict[str, Any]:
    """Return the maps as JSON. Grids are base64 of bytes in the order layer, choice, row, column."""
    layers, choices, height, width = maps.experts.shape
    weights = (maps.weights * 255).round().clamp(0, 255)
    return {
        "scale": maps.scale,
        "num_experts": maps.num_experts,
        "layers": layers,
        "choices": choices,
        "height": height,
        "width": width,
        "experts": _base64(maps.experts),
        "weights": _base64(weights),
        "load": [[round(share, 5) for share in layer] for layer in maps.load.tolist()],
    }


def _base64(values: torch.Tensor) -> str:
    return base64.b64encode(values.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def response(routing: PictureRouting) -> dict[str, Any]:
    """Return the body of the response."""
    return {
        "object": "cumo.routing",
        "picture": _png(routing.picture),
        "vision": [encoded(maps) for maps in routing.vision],
        "connector": None if routing.connector is None else encoded(routing.connector),
    }


class RoutingMaps:
    """The endpoint `/cumo/routing`.

    Args:
        engine: the parts that all endpoints share.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def __call__(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            ApiError: the request cannot be answered.
            ClientGoneError: the client hung up.
        """
        ticket = self._engine.slots.take()
        try:
            body = await read_body(request, self._engine.limits)
            return JSONResponse(await unless_gone(self._answer(body), request.receive))
        finally:
            ticket.release()

    async def _answer(self, body: bytes) -> dict[str, Any]:
        engine = self._engine
        picture = await engine.in_pool(self._picture, body)
        routing = await asyncio.wrap_future(engine.scheduler.call(lambda: picture_routing(engine.pipeline, picture)))
        return await engine.in_pool(response, routing)

    def _picture(self, body: bytes) -> Image.Image:
        picture = self._engine.reader.read(parse_request(RoutingRequest, body).image, "image")
        try:
            self._engine.pipeline.processor.check_extent(picture)
        except ValueError as error:
            raise ApiError(400, f"image: {error}") from error
        return picture
