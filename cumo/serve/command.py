# SPDX-License-Identifier: Apache-2.0
"""Serve a model: OpenAI's chat API, and a page to try it, in one process on this machine."""

from __future__ import annotations

import argparse
import ipaddress
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from cumo.inference.arguments import add_model_arguments, load_pipeline
from cumo.serve.limits import Limits
from cumo.serve.memory import settle

KEY_VARIABLE = "CUMO_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cumo serve`."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0 for any (default: %(default)s)")
    parser.add_argument("--model-id", help="what clients call the model; the name of its folder by default")
    parser.add_argument("--api-key", help=f"that clients have to send; better in the environment, as {KEY_VARIABLE}")
    parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from http(s) addresses, public ones")
    parser.add_argument(
        "--allowed-host", action="append", default=[], help="further name under which clients may ask, such as a domain"
    )
    limits = parser.add_argument_group("limits", "of one client; see docs/serving.md")
    for field in fields(Limits):
        kind = type(field.default)
        limits.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="%(default)s")


def allowed_hosts(host: str, further: list[str]) -> list[str] | None:
    """Return the host names that clients may use.

    None allows any name: the server listens to other machines and no name was given.
    """
    if _is_loopback(host):
        return [*LOOPBACK, host, *further]
    return [*LOOPBACK, host, *further] if further else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal arrives.

    Raises:
        ValueError: an argument has an invalid value.
        ModuleNotFoundError: a package of the extra `serve` is not installed.
    """
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in fields(Limits)})
    import uvicorn

    from cumo.serve.app import create_app

    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is None and not _is_loopback(arguments.host):
        print(f"Warning: whoever reaches {arguments.host} may use the model: there is no {KEY_VARIABLE}.")
    app = create_app(
        load_pipeline(arguments),
        model_id=arguments.model_id or Path(arguments.model).name or "cumo",
        limits=limits,
        api_key=key,
        allow_urls=arguments.allow_urls,
        allowed_hosts=allowed_hosts(arguments.host, arguments.allowed_host),
    )
    settle()
    uvicorn.run(app, host=arguments.host, port=arguments.port, **server_options(limits))


def server_options(limits: Limits) -> dict[str, Any]:
    """Return the settings of uvicorn."""
    from cumo.serve.protocol import with_header_timeout

    return {
        "http": with_header_timeout(limits.header_seconds),
        # Above this many connections uvicorn answers 503 unread; requests beyond the queue get a 429.
        "limit_concurrency": 4 * limits.slots + 64,
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": 10,
        "server_header": False,
        "proxy_headers": False,
    }
