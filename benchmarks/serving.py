# SPDX-License-Identifier: Apache-2.0
"""Runs `cumo serve` under load: many clients with good and bad requests; reports memory and throughput.

    python -m benchmarks.serving FOLDER --minutes 5 --clients 16

starts the server on the model of the folder, measures one client that asks one by one and then all of them at once,
lets all send mixed requests for the given time, and prints figures as JSON. It fails with a message if the server
ended, if an accepted good request got no answer, if a bad request got anything but its 4xx, or if memory at the end is
more than 5 % above that after the first fifth of the run.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

CHAT = "/v1/chat/completions"
ALLOWED_GROWTH = 0.05


def data_url(image: Image.Image, file_format: str = "PNG") -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    image.save(file, file_format)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def noise(seed: int, width: int, height: int) -> Image.Image:
    """A picture of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = [data_url(noise(seed, 300 + 20 * seed, 500 - 20 * seed), "JPEG") for seed in range(12)]


def question(draw: random.Random, pictures: int, tokens: int, **fields: Any) -> dict[str, Any]:
    """A good request."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": draw.choice(PICTURES)}} for _ in range(pictures)
    ]
    content.append({"type": "text", "text": f"What is this? {draw.randrange(1000)}"})
    return {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0} | fields


def shown(url: str) -> dict[str, Any]:
    """A request with one picture."""
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}


GOOD: list[Callable[[random.Random], dict[str, Any]]] = [
    lambda draw: question(draw, 0, draw.randrange(4, 48)),
    lambda draw: question(draw, 1, draw.randrange(4, 48)),
    lambda draw: question(draw, 1, draw.randrange(4, 48), stream=True),
    lambda draw: question(draw, 2, draw.randrange(4, 32), stream=True, stop=["the", "a"]),
    lambda draw: question(draw, 1, 16, temperature=1.0, top_p=0.9, seed=draw.randrange(100), n=2),
]
BAD: list[tuple[int, Callable[[random.Random], Any]]] = [
    (400, lambda _: shown(PICTURES[0][:-41])),
    (400, lambda _: shown("data:image/png;base64,aGVsbG8=")),
    (400, lambda _: shown("http://127.0.0.1/a.png")),
    (413, lambda _: shown(data_url(Image.new("1", (9000, 9))))),
    (400, lambda draw: question(draw, 1, 4, temperature=-1)),
    (400, lambda draw: question(draw, 9, 4)),
    (400, lambda _: {"messages": [{"role": "wizard", "content": "a"}]}),
    (400, lambda _: {"messages": [{"role": "user", "content": "word " * 400_000}]}),
    (404, lambda draw: question(draw, 0, 4, model="another")),
    (400, lambda _: b"{no json"),
]


class Response(NamedTuple):
    """Of a request."""

    status: int
    answered: bool
    """The body is a whole answer."""
    tokens: int
    seconds: float


class Server:
    """`cumo serve` in a process of its own."""

    def __init__(self, folder: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._log = log.open("w")
        command = [sys.executable, "-m", "cumo", "serve", folder, "--port", str(self.port), "--model-id", "load"]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        while not self._is_up():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.2)

    def _is_up(self) -> bool:
        try:
            return self.send("GET", "/health").status == 200
        except OSError:
            return False

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))

    def send(self, method: str, path: str, body: Any = None, hang_up: bool = False) -> Response:
        """A request and its response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=300)
        begin = time.monotonic()
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if hang_up:
                response.read(100)
                return Response(response.status, False, 0, time.monotonic() - begin)
            text = response.read().decode()
            return Response(response.status, *_answer(text), time.monotonic() - begin)
        finally:
            connection.close()

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)
        self._log.close()


def _answer(text: str) -> tuple[bool, int]:
    """Whether a body is a whole answer, and its tokens (0 for a stream)."""
    if text.startswith("data: "):
        return text.rstrip().endswith("data: [DONE]") and '"error"' not in text, 0
    body = json.loads(text) if text.startswith("{") else {}
    whole = bool(body.get("choices")) and all(choice["finish_reason"] for choice in body["choices"])
    return whole, body.get("usage", {}).get("completion_tokens", 0)


def throughput(server: Server, clients: int, requests: int, tokens: int) -> dict[str, float]:
    """Answers to as many requests, by as many clients at once: tokens per second, and the median of the seconds."""
    left = iter(range(requests))
    lock = threading.Lock()
    responses: list[Response] = []

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while True:
            with lock:
                if next(left, None) is None:
                    return
            response = server.send("POST", CHAT, question(draw, 1, tokens))
            with lock:
                responses.append(response)

    begin = time.monotonic()
    run_all([threading.Thread(target=client, args=(seed,)) for seed in range(clients)])
    seconds = time.monotonic() - begin
    return {
        "clients": clients,
        "answers_per_second": round(len(responses) / seconds, 2),
        "tokens_per_second": round(sum(response.tokens for response in responses) / seconds, 1),
        "median_seconds": round(statistics.median(response.seconds for response in responses), 3),
    }


def run_all(threads: list[threading.Thread]) -> None:
    """Start and join."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Load:
    """Clients that ask at random until the time is over."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self._server = server
        self._seconds = seconds
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    def run(self, clients: int) -> None:
        """All of them, and a thread that looks at memory."""
        run_all(
            [threading.Thread(target=self._client, args=(seed,)) for seed in range(clients)]
            + [threading.Thread(target=self._watch)]
        )

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    def _watch(self) -> None:
        while self._elapsed < self._seconds:
            self.memory.append((self._elapsed, self._server.memory()))
            time.sleep(1)

    def _client(self, seed: int) -> None:
        draw = random.Random(seed)
        while self._elapsed < self._seconds:
            try:
                kind, fault = self._ask(draw)
            except (OSError, HTTPException, ValueError) as error:
                kind, fault = "broken", repr(error)
            with self._lock:
                self.counts[kind] += 1
                if fault:
                    self.faults.append(f"{kind}: {fault}")

    def _ask(self, draw: random.Random) -> tuple[str, str]:
        chance = draw.random()
        if chance < 0.2:
            expected, make = draw.choice(BAD)
            response = self._server.send("POST", CHAT, make(draw))
            busy = response.status == 429
            return ("busy" if busy else "refused"), "" if busy or response.status == expected else str(response)
        if chance < 0.25:
            response = self._server.send("POST", CHAT, question(draw, 1, 400, stream=True), hang_up=True)
            return "hung up", ""
        response = self._server.send("POST", CHAT, draw.choice(GOOD)(draw))
        if response.status == 429:
            time.sleep(0.5)
            return "busy", ""
        return "answered", "" if response.status == 200 and response.answered else str(response)


def growth(memory: list[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """Of the resident memory, from the end of the first fifth to that of the run, each as a mean over a tenth."""

    def mean(begin: float, end: float) -> float:
        values = [size for moment, size in memory if begin * seconds <= moment <= end * seconds]
        return statistics.fmean(values) / 2**20

    tenths = [round(mean(tenth / 10, (tenth + 1) / 10), 1) for tenth in range(10)]
    return {"mib_by_tenth": tenths, "growth": round(tenths[9] / tenths[2] - 1, 4)}


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="checkpoint with its processor")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, for throughput")
    parser.add_argument("--log", type=Path, default=Path("serving.log"), help="of the server")
    arguments = parser.parse_args()
    server = Server(arguments.folder, arguments.log)
    try:
        throughput(server, arguments.clients, arguments.clients, 4)  # first calls are slow
        alone = throughput(server, 1, arguments.clients, arguments.tokens)
        together = throughput(server, arguments.clients, 4 * arguments.clients, arguments.tokens)
        load = Load(server, 60 * arguments.minutes)
        load.run(arguments.clients)
        alive = server.process.poll() is None
    finally:
        server.close()
    memory = growth(load.memory, 60 * arguments.minutes)
    speedup = round(together["tokens_per_second"] / alone["tokens_per_second"], 2)
    figures = {"one_by_one": alone, "at_once": together, "speedup": speedup, "requests": dict(load.counts)}
    print(json.dumps(figures | {"memory": memory, "faults": load.faults[:20]}, indent=2))
    if not alive:
        sys.exit("the server ended during the run")
    if load.faults:
        sys.exit(f"{len(load.faults)} requests got another answer than they should have")
    if memory["growth"] > ALLOWED_GROWTH:
        sys.exit(f"memory grew by {memory['growth']:.1%}")


if __name__ == "__main__":
    main()
