# SPDX-License-Identifier: Apache-2.0
"""Requests of any bytes: a 4xx in OpenAI's shape, or an answer; never a 5xx, and the server goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from random import Random

import pytest
from hypothesis import given

pytest.importorskip("fastapi", reason="the server is built on it")
pytest.importorskip("uvicorn", reason="the server runs in it")


from cumo.inference import CuMoPipeline
from cumo.serve.limits import Limits
from tests.fuzz.mutate import RANDOM, as_json, cases, damaged, mutated
from tests.fuzz.test_pictures import encoded
from tests.inference.tiny import picture, save_model
from tests.serve.serving import data_url, serving, user

CHAT, ROUTING = "/v1/chat/completions", "/cumo/routing"
LIMITS = Limits(
    max_body_bytes=1 << 20,
    max_image_bytes=1 << 19,
    max_text_bytes=20_000,
    max_tokens=3,
    default_tokens=2,
    upload_seconds=3.0,
)
PNG = data_url(picture())
REQUEST = {
    "model": "cumo",
    "messages": [
        {"role": "system", "content": "be brief"},
        user("What?", (PNG,)),
        {"role": "assistant", "content": "noise", "name": "it"},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ],
    "max_tokens": 2,
    "max_completion_tokens": None,
    "temperature": 0,
    "top_p": 1.0,
    "n": 1,
    "seed": 1,
    "stop": ["x"],
    "stream": False,
    "stream_options": {"include_usage": True},
    "user": "me",
    "tools": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
}
URLS = (
    "data:",
    "data:,",
    "data:image/png;base64",
    "data:image/png;base64,=",
    "data:image/png;base64,====",
    "DATA:IMAGE/PNG;BASE64,AAAA",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/png;base64,\u00e9",
    "data:image/png;base64," + "\n" * 1000,
    "data:image/png;base64,data:image/png;base64,",
    "data:image/png" + ";a=b" * 1000 + ";base64,AAAA",
    "https://[",
    "http://",
    "http://\x00",
    "file://localhost/etc/passwd",
    "javascript:1",
    " " + PNG,
)
RAW = (
    b"",
    b"\r\n\r\n",
    b"\0" * 100,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET " + b"/x" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"GET /%00%ff/../x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET //evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT a:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX\xff: \xff\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30,
)
LENGTHS = (b"0", b"-1", b"1", b"99999999999999999999", b"1e3", b"", b" 5", b"5, 5", b"0x10", b"\xb2", b"200")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that runs, with limits that are soon reached; at the end it must be as it was at the beginning."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    with serving(CuMoPipeline.from_pretrained(folder, device="cpu"), LIMITS) as running:
        before = ordinary(running)
        yield running
        end = time.monotonic() + 20
        while not running.is_idle() and time.monotonic() < end:
            time.sleep(0.05)
        assert running.is_idle()
        assert ordinary(running) == before
        check_metrics(running)


def check_metrics(server) -> None:
    """No request ended in a 5xx."""
    lines = server.request("GET", "/metrics")[2].decode().splitlines()
    assert not [line for line in lines if 'status="5' in line or 'code="5' in line]


def ordinary(server) -> str:
    """The answer to an ordinary request."""
    assert server.request("GET", "/health")[0] == 200
    status, body = server.chat({"messages": [user("What?", picture())], "temperature": 0, "max_tokens": 2})
    assert status == 200, body
    return body["choices"][0]["message"]["content"]


def check_error(status: int, content: bytes) -> None:
    """OpenAI's shape."""
    assert 400 <= status < 500, (status, content[:500])
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 2000


def check_body(server, random: Random) -> None:
    """A mutated request of one of the endpoints."""
    path = random.choice([CHAT, CHAT, CHAT, ROUTING])
    body = mutated(REQUEST if path == CHAT else {"image": PNG}, random)
    raw = as_json(body, random)
    post(server, path, raw)


def post(server, path: str, raw: bytes) -> None:
    """An answer, or an error in OpenAI's shape."""
    status, headers, content = server.request("POST", path, raw, content_type="application/json")
    if status != 200:
        check_error(status, content)
    elif headers["content-type"].startswith("text/event-stream"):
        assert content.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in content
    else:
        assert json.loads(content)["object"] in ("chat.completion", "cumo.routing")


def check_url(server, random: Random) -> None:
    """A picture of any bytes, or an address of any kind."""
    kind = random.randrange(3)
    url = random.choice(URLS)
    if kind == 0:
        raw = encoded(random)
        url = data_url(damaged(raw, random) if random.randrange(4) else raw)
    elif kind == 1:
        url = damaged(PNG.encode(), random).decode("latin-1")
    body = {"messages": [user("What?", (url,))], "max_tokens": 1}
    post(
        server,
        *((CHAT, json.dumps(body).encode()) if random.randrange(2) else (ROUTING, json.dumps({"image": url}).encode())),
    )


def http_request(random: Random) -> bytes:
    """A request with something wrong in its head or in how its body is sent."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    method = random.choice([b"POST", b"POST", b"POST", b"GET", b"PUT", b"DELETE", b"HEAD", b"PATCH", b"TRACE", b"X"])
    path = random.choice(
        [CHAT, ROUTING, "/", "/health", "/assets/%2e%2e/app.py", "/v1/models/a%ffb", "/cumo/model?x=%00"]
    )
    kind = random.choice([b"application/json", b"application/json; charset=utf-16", b"text/plain", b"", b"\xff"])
    head = [b"Host: localhost", b"Content-Type: " + kind, b"Connection: close"]
    if random.randrange(3) == 0:
        size = random.choice([b"%x" % len(body), b"zz", b"-1", b"fffffffffffffffff", b"0" * 5000 + b"1"])
        head.append(b"Transfer-Encoding: " + random.choice([b"chunked", b"chunked, chunked", b"gzip", b"\0"]))
        body = size + b"\r\n" + body + random.choice([b"\r\n0\r\n\r\n", b"", b"\r\n5"])
    if random.randrange(3):
        head.append(b"Content-Length: " + random.choice([b"%d" % len(body), random.choice(LENGTHS)]))
    if random.randrange(4) == 0:
        head.append(random.choice([b"Expect: 100-continue", b"Authorization: " + b"x" * 5000, b"X", b": x", b"a b: c"]))
    raw = b"%s %s HTTP/1.1\r\n%s\r\n\r\n%s" % (method, path.encode(), b"\r\n".join(head), body)
    return damaged(raw, random) if random.randrange(4) == 0 else raw


def exchange(server, raw: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for some bytes, after which the client sends no more."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        try:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        except OSError:  # the server has hung up already, which it may
            pass
        content = bytearray()
        try:
            while piece := connection.recv(1 << 16):
                content += piece
        except ConnectionError:
            pass
    return bytes(content)


def check_raw(server, random: Random) -> None:
    """Bytes that may be no request at all."""
    content = exchange(server, random.choice(RAW) if random.randrange(6) == 0 else http_request(random))
    if content:
        assert content.startswith(b"HTTP/1.1 "), content[:200]
        assert content[9:10] in b"12345" and content[9:10] != b"5", content[:500]


@cases()
@given(random=RANDOM)
def test_bodies(server, random):
    check_body(server, random)


@cases(0.6)
@given(random=RANDOM)
def test_pictures_and_addresses(server, random):
    check_url(server, random)


@cases()
@given(random=RANDOM)
def test_heads(server, random):
    check_raw(server, random)


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_bytes_that_are_no_request(server, raw):
    content = exchange(server, raw)
    assert not content or content.startswith(b"HTTP/1.1 ")
    assert not content.startswith(b"HTTP/1.1 5")


@pytest.mark.parametrize("size", [b"zz", b"-1", b"0" * 5000 + b"1"], ids=["letters", "negative", "long"])
@pytest.mark.parametrize("method", [b"POST", b"GET"])
def test_bodies_that_break_off_leave_no_traceback(server, method, size):
    head = b"Host: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("uvicorn.error").addHandler(handler)
    try:
        content = exchange(server, method + b" /v1/chat/completions HTTP/1.1\r\n" + head + size + b"\r\nx")
        assert ordinary(server)
    finally:
        logging.getLogger("uvicorn.error").removeHandler(handler)
    assert not content or content.startswith(b"HTTP/1.1 4")
    assert not [record.getMessage() for record in records if record.exc_info]


def test_slow_clients_keep_nobody_waiting(server):
    """Heads and bodies that come a byte now and then, and clients that say nothing."""
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = []
    try:
        for number in range(30):
            connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            slow.append(connection)
            connection.sendall([b"", request[: 5 + number], request + b"Content-Length: 100\r\n\r\n{"][number % 3])
        for piece in (b"a", b"b"):
            assert ordinary(server)
            for connection in slow:
                with contextlib.suppress(OSError):  # on a busy machine its time is over by now
                    connection.sendall(piece)
    finally:
        for connection in slow:
            connection.close()
