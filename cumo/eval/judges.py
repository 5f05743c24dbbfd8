# SPDX-License-Identifier: Apache-2.0
"""Judges of open answers: an OpenAI-compatible endpoint, or replies that were recorded.

A judge is a function from a prompt to a reply. `Recorder` keeps every reply of another judge in a file as it comes, so
that no reply is paid for twice and a score can be computed again without an endpoint.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cumo.data.yaml_text import shown
from cumo.eval.records import append_records, read_records

Judge = Callable[[str], str]

KEY_VARIABLE = "OPENAI_API_KEY"
_RETRIED = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class JudgeSettings:
    """How a benchmark asks its judge: as the published scripts do."""

    system: str | None
    temperature: float
    max_tokens: int


class EndpointJudge:
    """Asks `POST {url}/chat/completions` of an OpenAI-compatible server.

    Args:
        url: such as `https://api.openai.com/v1`.
        model: as the server calls it.
        settings: of the benchmark.
        key: sent as bearer token; by default the environment variable `OPENAI_API_KEY`, and none without it.
        attempts: how often a request is sent while the server is busy or does not answer.
        timeout: seconds to wait for a reply.
    """

    def __init__(
        self,
        url: str,
        model: str,
        settings: JudgeSettings,
        *,
        key: str | None = None,
        attempts: int = 6,
        timeout: float = 120.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected one of http or https, got {url!r}")
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.settings = settings
        self.key = os.environ.get(KEY_VARIABLE) if key is None else key
        self.attempts = attempts
        self.timeout = timeout

    def __call__(self, prompt: str) -> str:
        """The reply to a prompt.

        Raises:
            OSError: the server cannot be reached or refuses.
            ValueError: it replies something else than a chat completion.
        """
        messages = [{"role": "user", "content": prompt}]
        if self.settings.system is not None:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        reply = self._send(urllib.request.Request(self.url, json.dumps(body).encode(), headers))
        try:
            return str(json.loads(reply)["choices"][0]["message"]["content"] or "")
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{self.url}: expected a chat completion, got {reply[:200]!r}") from error

    def _send(self, request: urllib.request.Request) -> bytes:
        for attempt in range(1, self.attempts + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                with error:
                    detail = error.read(500).decode(errors="replace")
                if error.code not in _RETRIED or attempt == self.attempts:
                    raise OSError(f"{self.url}: HTTP status {error.code}: {detail}") from error
            except OSError as error:
                if attempt == self.attempts:
                    raise OSError(f"{self.url}: {error}") from error
            time.sleep(min(2.0**attempt, 30.0) / 2)
        raise AssertionError("unreachable")


class Recorder:
    """Replies from a file, and those of another judge, which are added to it.

    The file has an object {"prompt", "reply"} a line. Several replies to one prompt are given in turn, one a time.

    Args:
        path: the file; it need not exist if there is a judge.
        judge: asked for what the file does not hold; without one that is an error.
    """

    def __init__(self, path: Path, judge: Judge | None = None) -> None:
        self.path = path
        self.judge = judge
        self._replies: defaultdict[str, list[str]] = defaultdict(list)
        self._given: defaultdict[str, int] = defaultdict(int)
        if judge is not None and not path.exists():
            return
        for source, record in read_records(path):
            if not isinstance(record.get("prompt"), str) or not isinstance(record.get("reply"), str):
                raise ValueError(f"{source}: expected prompt and reply, got {shown(record)}")
            self._replies[record["prompt"]].append(record["reply"])

    def __call__(self, prompt: str) -> str:
        """The next reply to a prompt.

        Raises:
            ValueError: there is none, and no judge.
        """
        replies, turn = self._replies[prompt], self._given[prompt]
        if turn >= len(replies):
            if self.judge is None:
                raise ValueError(f"{self.path}: expected reply {turn + 1} to the prompt that ends {prompt[-120:]!r}")
            replies.append(self.judge(prompt))
            append_records(self.path, [{"prompt": prompt, "reply": replies[-1]}])
        self._given[prompt] += 1
        return replies[turn]
