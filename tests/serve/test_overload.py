# SPDX-License-Identifier: Apache-2.0
"""Clients that hang up, that are slow, that are too many: places come free, and the server goes on."""

import asyncio
import dataclasses
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest

from cumo.inference import GenerationOptions
from cumo.serve.completions import Answer, Event
from cumo.serve.http import Slots
from cumo.serve.limits import Limits
from cumo.serve.metrics import Metrics
from cumo.serve.scheduler import Job, Scheduler
from cumo.serve.schemas import ChatRequest
from tests.inference.tiny import ask, picture
from tests.serve.serving import data_url, serving, until, user

SHORT = {"model": "cumo", "temperature": 0, "max_tokens": 4}
LONG = SHORT | {"max_tokens": 100_000}  # would go on for minutes
PATIENT = Limits(max_tokens=100_000, max_batch_tokens=10**9)


def tokens(server):
    return server.metric("cumo_completion_tokens_total")


@pytest.fixture(scope="module")
def patient(pipeline):
    with serving(pipeline, PATIENT) as server:
        yield server


def test_closing_a_stream_frees_its_place(patient):
    with patient.client() as client:
        stream = client.chat.completions.create(messages=[user("Hello")], stream=True, **LONG)
        assert any(chunk.choices[0].delta.content for chunk in stream)
        assert patient.app.state.slots.taken == 1
        stream.close()
        until(patient.is_idle)
        before = tokens(patient)
        assert before < 50_000
        assert client.chat.completions.create(messages=[user("Hello")], **SHORT).choices
        assert tokens(patient) == before + 4


@pytest.mark.parametrize("ticks", range(4))
def test_a_client_that_goes_at_the_moment_of_the_next_piece(pipeline, ticks):
    """Neither the piece nor the cancellation may win over the other for good: the stream has to end."""

    async def run():
        answer = Answer(ChatRequest(messages=[{"role": "user", "content": "a"}]), "cumo", Slots(1).take(), metrics)
        answer.rows = [pipeline.prepare(ask("a"), GenerationOptions())]

        async def read():
            async for _ in answer.chunks():
                pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        answer.events.put_nowait(Event(0, "piece"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        reading.cancel()
        _, left = await asyncio.wait([reading], timeout=5)
        assert not left
        assert reading.cancelled()

    metrics = Metrics(pipeline.features, lambda: 0)
    asyncio.run(run())


def raw(server, body):
    """A connection that has sent a request and reads nothing."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_hanging_up_frees_the_place(patient, stream):
    connection = raw(patient, {"messages": [user("Hello")], "stream": stream} | LONG)
    until(lambda: patient.app.state.slots.taken == 1 and patient.metric("cumo_answers_running") == 1)
    connection.close()
    until(patient.is_idle)


def test_hanging_up_while_waiting(patient):
    scheduler = patient.app.state.scheduler
    go = threading.Event()
    scheduler.call(lambda: go.wait(30))
    connection = raw(patient, {"messages": [user("Hello", picture())]} | LONG)
    until(lambda: scheduler.waiting == 1)
    connection.close()
    until(lambda: patient.app.state.slots.taken == 0)
    go.set()
    until(patient.is_idle)


def test_hanging_up_with_half_a_body(patient):
    connection = raw(patient, {"messages": [user("Hello")]})
    connection.close()
    half = socket.create_connection(("127.0.0.1", patient.port))
    half.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n{"
    )
    until(lambda: patient.app.state.slots.taken == 1)
    half.close()
    until(patient.is_idle)


def test_others_of_the_batch_go_on(patient, pipeline):
    expected = pipeline.generate([ask("Hello")], GenerationOptions(max_new_tokens=300))[0]
    go = threading.Event()
    patient.app.state.scheduler.call(lambda: go.wait(30))
    with patient.client() as client, ThreadPoolExecutor(1) as pool:
        connection = raw(patient, {"messages": [user("What?")]} | LONG)
        answer = pool.submit(client.chat.completions.create, messages=[user("Hello")], **SHORT | {"max_tokens": 300})
        until(lambda: patient.app.state.scheduler.waiting == 2)
        go.set()
        until(lambda: patient.metric("cumo_answers_running") == 2)
        connection.close()
        assert answer.result().choices[0].message.content == expected.text
    until(patient.is_idle)


def test_an_answer_that_ends_early_does_not_wait_for_its_batch(patient):
    go = threading.Event()
    patient.app.state.scheduler.call(lambda: go.wait(30))
    with patient.client() as client, ThreadPoolExecutor(1) as pool:
        connection = raw(patient, {"messages": [user("What?")]} | LONG)
        answer = pool.submit(client.chat.completions.create, messages=[user("Hello")], **SHORT)
        until(lambda: patient.app.state.scheduler.waiting == 2)
        go.set()
        assert answer.result(timeout=30).choices[0].finish_reason == "length"
        assert patient.metric("cumo_answers_running") == 2  # the long one runs still
        connection.close()
    until(patient.is_idle)


def test_too_many_are_told_to_come_back(pipeline):
    limits = Limits(max_batch_size=2, max_queue=2, max_tokens=100_000, max_batch_tokens=10**9)
    with serving(pipeline, limits) as server, server.client() as client:
        streams = []
        for _ in range(4):
            streams.append(client.chat.completions.create(messages=[user("Hello")], stream=True, **LONG))
        with pytest.raises(openai.RateLimitError, match="the server is busy with 4 requests; try again soon") as caught:
            client.chat.completions.create(messages=[user("Hello")], **SHORT)
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        status, _, _ = server.request("POST", "/cumo/routing", {"image": data_url(picture())})
        assert status == 429
        assert server.request("GET", "/health")[0] == 200  # it can still be asked how it is
        assert json.loads(server.request("GET", "/health")[2])["status"] == "ok"
        for stream in streams:
            stream.close()
        until(server.is_idle)
        assert client.chat.completions.create(messages=[user("Hello")], **SHORT).choices


def test_a_client_that_reads_nothing_keeps_no_place(pipeline):
    """Its place comes free with its last token, whether anybody took the pieces or not."""

    async def run():
        slots = Slots(1)
        request = ChatRequest(messages=[{"role": "user", "content": "a"}], stream=True)
        answer = Answer(request, "cumo", slots.take(), Metrics(pipeline.features, lambda: 0))
        options = GenerationOptions(max_new_tokens=3)
        answer.rows = [pipeline.prepare(ask("a"), options, partial(answer.say, 0), partial(answer.end, 0))]
        await asyncio.to_thread(pipeline.run, answer.rows)
        await asyncio.sleep(0.01)
        assert slots.taken == 0
        assert answer.events.qsize() >= 1

    asyncio.run(run())


def test_a_body_that_does_not_come(pipeline):
    with serving(pipeline, Limits(upload_seconds=0.2)) as server:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        slow.settimeout(30)
        answer = b""
        while b"expected the body within 0.2 seconds" not in answer:
            piece = slow.recv(4096)
            assert piece, f"the connection ends with {answer!r}"
            answer += piece
        assert b" 408 " in answer.splitlines()[0]
        slow.close()
        until(server.is_idle)


def test_headers_that_do_not_come(pipeline):
    """Connections that are opened and say nothing, or half of a header, give their places back, again and again."""
    limits = Limits(header_seconds=2.0)
    with serving(pipeline, limits) as server:
        for _ in range(2):
            silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4 * limits.slots + 70)]
            for connection in silent[::2]:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
            until(lambda: server.request("GET", "/health")[0] == 200)
            for connection in silent:
                connection.settimeout(30)
                assert connection.recv(1) == b""
                connection.close()


def test_headers_that_stop_in_the_second_request(pipeline):
    with serving(pipeline, Limits(header_seconds=2.0)) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.settimeout(30)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(65536).splitlines()[0]
        connection.sendall(b"GET /health HTT")
        while connection.recv(65536):
            pass
        connection.close()


def test_a_long_answer_outlives_the_time_for_headers(pipeline):
    limits = dataclasses.replace(PATIENT, header_seconds=1.0)
    with serving(pipeline, limits) as server, server.client() as client:
        with client.chat.completions.create(messages=[user("Hello")], stream=True, **LONG) as stream:
            next(stream)
            time.sleep(2.0)
            next(stream)
            assert server.metric("cumo_answers_running") == 1
        until(server.is_idle)


def test_a_request_larger_than_a_batch_is_refused(pipeline):
    with serving(pipeline, Limits(max_batch_tokens=100)) as server:
        status, answer = server.chat({"messages": [user("Hello")], "max_tokens": 400})
        assert status == 400
        assert answer["error"]["message"].startswith("messages: expected up to 100 tokens with the answer, got 4")


def test_the_end_of_the_server_ends_answers(pipeline):
    with serving(pipeline, PATIENT, {"timeout_graceful_shutdown": 1, "log_level": "critical"}) as server:
        connection = raw(server, {"messages": [user("Hello")], "stream": True} | LONG)
        until(lambda: server.metric("cumo_answers_running") == 1)
    assert not server.app.state.scheduler.is_alive
    connection.close()


@pytest.fixture
def scheduler(pipeline):
    scheduler = Scheduler(pipeline, Limits(max_batch_size=4, max_batch_tokens=400), company_seconds=0)
    yield scheduler
    scheduler.close(timeout=30)


def batches(scheduler, pipeline, monkeypatch, requests, fails=()):
    """Sizes of the batches in which requests (text, tokens) are answered, and the errors."""
    sizes, errors, ended = [], [], []
    run = pipeline.run

    def note(rows):
        sizes.append(len(rows))
        if any(
            row.prompt_ids[-5:] == pipeline.prepare(ask(text), options).prompt_ids[-5:]
            for text in fails
            for row in rows
        ):
            raise MemoryError("too much")
        run(rows)

    options = GenerationOptions(max_new_tokens=2)
    monkeypatch.setattr(pipeline, "run", note)
    go = threading.Event()
    scheduler.call(lambda: go.wait(30))
    for text, count in requests:
        row = pipeline.prepare(ask(text), GenerationOptions(max_new_tokens=count), on_end=lambda: ended.append(1))
        scheduler.submit(Job(row, errors.append))
    go.set()
    until(lambda: len(ended) + len(errors) == len(requests))
    return sizes, errors


def test_batches_are_as_large_as_they_may_be(scheduler, pipeline, monkeypatch):
    sizes, _ = batches(scheduler, pipeline, monkeypatch, [("a", 2)] * 9)
    assert sizes == [4, 4, 1]


def test_batches_of_long_answers_are_smaller(scheduler, pipeline, monkeypatch):
    # prompts have about 50 tokens: 400 tokens are two rows of 150, and not one of 500, which runs alone
    sizes, _ = batches(scheduler, pipeline, monkeypatch, [("a", 100), ("a", 2), ("a", 2), ("a", 500), ("a", 2)])
    assert sizes == [2, 1, 1, 1]


def test_one_request_that_is_too_much_fails_alone(scheduler, pipeline, monkeypatch):
    requests = [("good", 2), ("a very bad one", 2), ("fine", 2)]
    sizes, errors = batches(scheduler, pipeline, monkeypatch, requests, fails=["a very bad one"])
    assert sizes == [3, 1, 1, 1]
    assert [type(error) for error in errors] == [MemoryError]


def test_a_closed_scheduler_takes_nothing(pipeline):
    scheduler = Scheduler(pipeline, Limits())
    scheduler.close(timeout=30)
    assert not scheduler.is_alive
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        scheduler.call(lambda: None)
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        scheduler.submit(Job(pipeline.prepare(ask("a"), GenerationOptions()), print))


def test_limits_are_positive():
    with pytest.raises(ValueError, match="max_images: expected a positive number, got 0"):
        Limits(max_images=0)
    with pytest.raises(ValueError, match="upload_seconds: expected a positive number, got nan"):
        Limits(upload_seconds=float("nan"))
