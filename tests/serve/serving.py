# SPDX-License-Identifier: Apache-2.0
"""A server for tests, and requests that no client library would send."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.client import HTTPConnection

import openai
import uvicorn

from cumo.serve.app import create_app
from cumo.serve.command import allowed_hosts, server_options
from cumo.serve.limits import Limits


class Server:
    """One that runs."""

    def __init__(self, app, port):
        self.app = app
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key="none", **options):
        """The official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def request(self, method, path, body=None, **headers):
        """Status, headers and body of a plain request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                headers.setdefault("content_type", "application/json")
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def chat(self, body, **headers):
        """Status and JSON of a chat request."""
        status, _, content = self.request("POST", "/v1/chat/completions", body, **headers)
        return status, json.loads(content)

    def metric(self, name):
        """Value of a metric."""
        for line in self.request("GET", "/metrics")[2].decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def is_idle(self):
        """Nothing waits, runs or has a place."""
        return not (
            self.app.state.slots.taken or self.metric("cumo_answers_running") or self.app.state.scheduler.waiting
        )


@contextlib.contextmanager
def serving(pipeline, limits=None, uvicorn_options=None, **options):
    """A server in a thread."""
    limits = limits or Limits()
    options.setdefault("allowed_hosts", allowed_hosts("127.0.0.1", []))
    app = create_app(pipeline, limits=limits, **options)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        settings = server_options(limits) | (uvicorn_options or {})
        config = uvicorn.Config(app, **{"log_level": "warning", "access_log": False, "ws": "none"} | settings)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Server(app, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive(), "the server did not end"


def until(condition, seconds=20.0):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def data_url(image, file_format="PNG", **options):
    """Of a PIL image, or of bytes."""
    content = image
    if not isinstance(image, bytes):
        file = io.BytesIO()
        image.save(file, file_format, **options)
        content = file.getvalue()
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(content).decode()}"


def user(*parts):
    """A message: strings, and pictures or their addresses as ("url",)."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            url = part[0] if isinstance(part, tuple) else data_url(part)
            content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content}
