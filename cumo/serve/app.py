# SPDX-License-Identifier: Apache-2.0
"""The web application: its endpoints, its page and its error handlers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cumo.inference.fetch import fetch
from cumo.inference.pipeline import CuMoPipeline
from cumo.serve.completions import ChatCompletions
from cumo.serve.engine import Engine
from cumo.serve.errors import ApiError
from cumo.serve.guard import ASSETS, Guard
from cumo.serve.http import ClientGoneError, Slots
from cumo.serve.images import ImageReader
from cumo.serve.limits import Limits
from cumo.serve.maps import RoutingMaps
from cumo.serve.memory import give_back
from cumo.serve.metrics import Metrics
from cumo.serve.scheduler import Scheduler
from cumo.serve.schemas import ChatRequest, RoutingRequest

CHAT, ROUTING = "/v1/chat/completions", "/cumo/routing"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def create_app(
    pipeline: CuMoPipeline,
    *,
    model_id: str = "cumo",
    limits: Limits | None = None,
    api_key: str | None = None,
    allow_urls: bool = False,
    allowed_hosts: Collection[str] | None = None,
    fetch: Callable[..., bytes] = fetch,
) -> FastAPI:
    """Return the application. It owns the pipeline from here on.

    Args:
        pipeline: the pipeline that answers.
        model_id: name of the model in requests and responses.
        limits: upper limits of a request; `Limits()` by default.
        api_key: see `Guard`.
        allow_urls: whether a picture may be a web address, which the server then fetches.
        allowed_hosts: see `Guard`.
        fetch: function that returns the content of an address.
    """
    limits = limits or Limits()
    scheduler = Scheduler(pipeline, limits)
    scheduler.metrics = metrics = Metrics(pipeline.features, lambda: scheduler.waiting)
    slots = Slots(limits.slots)
    pool = ThreadPoolExecutor(min(4, max(2, os.cpu_count() or 1)), thread_name_prefix="cumo-decode")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(give_back())
        yield
        tidying.cancel()
        scheduler.close(timeout=30)
        pool.shutdown(wait=False, cancel_futures=True)

    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(title="CuMo", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.scheduler, app.state.slots, app.state.metrics = scheduler, slots, metrics
    engine = Engine(pipeline, scheduler, ImageReader(limits, allow_urls, fetch), limits, slots, pool)
    chat, maps = ChatCompletions(engine, model_id, metrics), RoutingMaps(engine)
    for path, endpoint, schema in ((CHAT, chat, ChatRequest), (ROUTING, maps, RoutingRequest)):
        body = {"content": {"application/json": {"schema": schema.model_json_schema()}}, "required": True}
        app.add_api_route(path, _bound(endpoint), methods=["POST"], openapi_extra={"requestBody": body})
    _add_information(app, pipeline, model_id, limits, scheduler, metrics)
    _add_page(app)
    _add_errors(app)
    paths = [CHAT, ROUTING, "/v1/models", "/health", "/metrics", "/cumo/model", "/"]
    app.add_middleware(Guard, metrics=metrics, paths=paths, api_key=api_key, allowed_hosts=allowed_hosts)
    return app


def _bound(endpoint: ChatCompletions | RoutingMaps) -> Callable[..., Any]:
    async def call(request: Request) -> Response:
        return await endpoint(request)

    call.__name__ = type(endpoint).__name__
    return call


def _add_information(
    app: FastAPI, pipeline: CuMoPipeline, model_id: str, limits: Limits, scheduler: Scheduler, metrics: Metrics
) -> None:
    created = int(time.time())
    model = {"id": model_id, "object": "model", "created": created, "owned_by": "cumo"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != model_id:
            raise ApiError(404, f"model: expected {model_id!r}, got {name[:80]!r}", "model_not_found")
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = scheduler.is_alive
        return JSONResponse(
            {"status": "ok" if alive else "stopped", "waiting": scheduler.waiting}, 200 if alive else 503
        )

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/cumo/model")
    async def description() -> dict[str, Any]:
        return describe(pipeline, model_id, limits)


def describe(pipeline: CuMoPipeline, model_id: str, limits: Limits) -> dict[str, Any]:
    """Return what the page shows of a model."""
    config = pipeline.model.config
    vision = config.vision_config
    return {
        "id": model_id,
        "language_model": config.text_config.model_type,
        "context": pipeline.max_tokens,
        "patches": vision.num_patches,
        "scales": list(vision.scales),
        "vision": {
            "experts": vision.num_experts,
            "choices": vision.num_experts_per_tok,
            "layers": vision.num_used_layers,
        },
        "connector": {"experts": config.connector_num_experts, "choices": config.connector_num_experts_per_tok},
        "limits": {
            "image_bytes": limits.max_image_bytes,
            "images": limits.max_images,
            "tokens": limits.max_tokens,
        },
    }


def _add_page(app: FastAPI) -> None:
    files = {}
    for file in (resources.files("cumo.serve") / "page").iterdir():
        suffix = os.path.splitext(file.name)[1]
        if suffix in MEDIA_TYPES:
            files[file.name] = (file.read_bytes(), MEDIA_TYPES[suffix])

    def page_file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no {name[:80]!r} here")
        content, media_type = files[name]
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file("index.html")

    @app.get(ASSETS + "{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return page_file(name)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(ClientGoneError)
    async def client_gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=499)  # nobody reads it; the status is for the log and the metrics

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {404: f"there is no {request.url.path[:80]} here", 405: f"{request.method} is not possible here"}
        return ApiError(
            error.status_code, message.get(error.status_code, str(error.detail)), headers=dict(error.headers or {})
        ).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return ApiError(500, f"the server failed on this request ({type(error).__name__}); it goes on").response()
