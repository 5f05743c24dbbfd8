# SPDX-License-Identifier: Apache-2.0
"""The official client against the real server: whole and streamed answers, batches, pictures, its kinds of errors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from cumo.inference import GenerationOptions
from tests.inference.tiny import ask, picture
from tests.serve.serving import serving, until, user

GREEDY = {"model": "cumo", "temperature": 0, "max_tokens": 12}
OPTIONS = GenerationOptions(max_new_tokens=12)


def expected(pipeline, *parts, **options):
    return pipeline.generate([ask(*parts)], GenerationOptions(**{"max_new_tokens": 12, **options}))[0]


def test_a_whole_answer(client, pipeline):
    response = client.chat.completions.create(messages=[user("What is this?", picture())], **GREEDY)
    completion = expected(pipeline, "What is this?", picture())
    assert response.object == "chat.completion"
    assert response.model == "cumo"
    (choice,) = response.choices
    assert (choice.message.role, choice.message.content) == ("assistant", completion.text)
    assert choice.finish_reason == completion.finish_reason == "length"
    assert response.usage.prompt_tokens == completion.prompt_tokens
    assert response.usage.completion_tokens == 12
    assert response.usage.total_tokens == completion.prompt_tokens + 12


def test_a_streamed_answer(client, pipeline):
    chunks = list(
        client.chat.completions.create(
            messages=[user("What is this?", picture())], stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) == expected(pipeline, "What is this?", picture()).text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_the_first_piece_comes_before_the_last_is_made(client):
    stream = client.chat.completions.create(messages=[user("Hello")], stream=True, **GREEDY | {"max_tokens": 2000})
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()


def test_several_pictures_turns_and_a_system_prompt(client, pipeline):
    messages = [
        {"role": "system", "content": "You are brief."},
        user("Compare", picture(1), "and", picture(2)),
        {"role": "assistant", "content": "They differ."},
        user("How?"),
    ]
    response = client.chat.completions.create(messages=messages, **GREEDY)
    conversation = [
        {"role": "system", "content": "You are brief."},
        *ask("Compare", picture(1), "and", picture(2)),
        {"role": "assistant", "content": "They differ."},
        *ask("How?"),
    ]
    assert response.choices[0].message.content == pipeline.generate([conversation], OPTIONS)[0].text
    as_developer = [{"role": "developer", "content": "You are brief."}, *messages[1:]]
    again = client.chat.completions.create(messages=as_developer, **GREEDY)
    assert again.choices[0].message.content == response.choices[0].message.content


def test_an_answer_goes_back_as_the_client_holds_it(client):
    messages = [user("Hello")]
    message = client.chat.completions.create(messages=messages, **GREEDY).choices[0].message
    said = {"role": "assistant", "content": message.content}
    expected = client.chat.completions.create(messages=[*messages, said, user("And?")], **GREEDY)
    empty = {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": []}
    for form in (message, message.model_dump(), message.to_dict(), said | empty):
        again = client.chat.completions.create(messages=[*messages, form, user("And?")], **GREEDY)
        assert again.choices[0].message.content == expected.choices[0].message.content


def test_waiting_requests_are_answered_together(pipeline):
    questions = [("Hello",), ("What?", picture(1)), ("Why?", picture(2), picture(3)), ("Who?",), ("Where?", picture(4))]
    begun, go = threading.Event(), threading.Event()
    with serving(pipeline) as server, server.client() as client, ThreadPoolExecutor(8) as pool:
        server.app.state.scheduler.call(lambda: (begun.set(), go.wait(30)))  # the model is busy
        assert begun.wait(30)
        answers = [
            pool.submit(client.chat.completions.create, messages=[user(*question)], stream=index % 2 == 1, **GREEDY)
            for index, question in enumerate(questions)
        ]
        until(lambda: server.app.state.scheduler.waiting == len(questions))
        go.set()
        for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            if index % 2:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer.result())
            else:
                text = answer.result().choices[0].message.content
            assert text == expected(pipeline, *question).text
        assert server.metric("cumo_batch_size_count") == 1
        assert server.metric("cumo_batch_size_sum") == len(questions)


def test_sampling_by_seed_and_several_choices(client, pipeline):
    hot = GREEDY | {"temperature": 1.5, "seed": 11, "top_p": 0.95}
    first = client.chat.completions.create(messages=[user("Hello")], n=3, **hot)
    again = client.chat.completions.create(messages=[user("Hello")], n=3, **hot)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == expected(pipeline, "Hello", temperature=1.5, seed=11, top_p=0.95).text
    assert first.usage.completion_tokens == 36
    streamed = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(messages=[user("Hello")], n=3, stream=True, **hot):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_stop_strings(client, pipeline):
    full = expected(pipeline, "Hello").text
    stop = full[5:8]
    response = client.chat.completions.create(messages=[user("Hello")], stop=["zzzzz", stop], **GREEDY)
    assert response.choices[0].message.content == full[: full.index(stop)].strip()
    assert response.choices[0].finish_reason == "stop"


def test_limits_of_the_answer_under_both_names(client):
    response = client.chat.completions.create(
        messages=[user("Hello")], model="cumo", temperature=0, max_completion_tokens=3
    )
    assert response.usage.completion_tokens == 3


def test_fields_that_ask_for_nothing_are_accepted(client):
    response = client.chat.completions.create(
        messages=[user("Hello")],
        frequency_penalty=0,
        presence_penalty=0,
        user="somebody",
        tools=[],
        response_format={"type": "text"},
        **GREEDY,
    )
    assert response.choices[0].message.content


def test_models(client):
    assert [model.id for model in client.models.list()] == ["cumo"]
    assert client.models.retrieve("cumo").owned_by == "cumo"
    with pytest.raises(openai.NotFoundError, match="model: expected 'cumo', got 'gpt-4o'"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="model: expected 'cumo', got 'gpt-4o'"):
        client.chat.completions.create(messages=[user("Hello")], **GREEDY | {"model": "gpt-4o"})


def test_errors_of_the_client_have_their_kinds(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=[user("Hello")], **GREEDY | {"temperature": -1})
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    assert "temperature: input should be greater than or equal to 0, got -1" in caught.value.message


def test_the_key(pipeline):
    with serving(pipeline, api_key="secret") as server:
        with server.client("secret") as client:
            assert client.chat.completions.create(messages=[user("Hello")], **GREEDY).choices
        for key in ("wrong", "sécret"):
            status, _, _ = server.request("GET", "/v1/models", authorization=f"Bearer {key}".encode("latin-1"))
            assert status == 401
        with (
            server.client("wrong") as client,
            pytest.raises(openai.AuthenticationError, match="expected the server's key"),
        ):
            client.models.list()
        for path, status in (("/metrics", 401), ("/cumo/model", 401), ("/", 200), ("/health", 200), ("/nothing", 401)):
            assert server.request("GET", path)[0] == status, path


def test_a_model_that_fails_says_so_and_goes_on(pipeline, monkeypatch):
    with serving(pipeline) as server, server.client() as client:
        generate = pipeline.model.generate
        monkeypatch.setattr(pipeline.model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError("no memory")))
        with pytest.raises(openai.InternalServerError, match=r"the model failed on this request \(MemoryError\)"):
            client.chat.completions.create(messages=[user("Hello")], **GREEDY)
        with pytest.raises(openai.APIError, match="the model failed on this request"):
            list(client.chat.completions.create(messages=[user("Hello")], stream=True, **GREEDY))
        monkeypatch.setattr(pipeline.model, "generate", generate)
        assert client.chat.completions.create(messages=[user("Hello")], **GREEDY).choices
        assert server.metric("cumo_batch_failures_total") == 2
        until(server.is_idle)
