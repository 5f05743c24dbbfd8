# SPDX-License-Identifier: Apache-2.0
"""Answers of a tiny model: the same batched, streamed, one by one and from cached features; options of each row."""

import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from cumo.checkpoints.convert import convert_to_published
from cumo.inference import CuMoPipeline, GenerationOptions
from tests.inference.tiny import ask, picture, tokenizer_model

GREEDY = GenerationOptions(max_new_tokens=16)
CONVERSATIONS = [
    ask("Hello"),
    ask("What is this?", picture()),
    ask(picture(1, 50, 20), "and", picture(2), "compare them", system="You are brief."),
    [*ask("What is this?", picture(3)), {"role": "assistant", "content": "A cat."}, *ask("And that?", picture(4))],
    ask("the same picture twice", picture(5), picture(5)),
]


def test_greedy_answers_are_the_same_however_they_are_asked_for(pipeline):
    pipeline.features.clear()
    batched = pipeline.generate(CONVERSATIONS, GREEDY)
    assert len({completion.text for completion in batched}) == len(batched), "the model looks at nothing"
    hits = pipeline.features.hits
    assert pipeline.generate(CONVERSATIONS, GREEDY) == batched  # from cached features
    assert pipeline.features.hits == hits + 7
    assert [pipeline.generate([conversation], GREEDY)[0] for conversation in CONVERSATIONS] == batched
    assert ["".join(pipeline.stream(conversation, GREEDY)) for conversation in CONVERSATIONS] == [
        completion.text for completion in batched
    ]
    without_cache = CuMoPipeline(pipeline.model, pipeline.processor, feature_cache_bytes=0)
    assert without_cache.generate(CONVERSATIONS, GREEDY) == batched
    assert len(without_cache.features) == 0
    static = CuMoPipeline(pipeline.model, pipeline.processor, static_cache=True)
    assert static.generate(CONVERSATIONS, GREEDY) == batched


def test_answers_are_those_of_the_model_and_its_processor(pipeline):
    for conversation in CONVERSATIONS[:3]:
        images = [part["image"] for message in conversation for part in message["content"] if "image" in part]
        text = pipeline.processor.apply_chat_template(conversation, tokenize=False)
        inputs = pipeline.processor(images or None, text, return_tensors="pt")
        with torch.no_grad():
            ids = pipeline.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = pipeline.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        (completion,) = pipeline.generate([conversation], GREEDY)
        assert completion.text == expected.strip()
        assert completion.prompt_tokens == inputs["input_ids"].shape[1]


def test_the_published_layout(folder, pipeline, tmp_path):
    convert_to_published(folder, tmp_path / "published")
    shutil.copy(tokenizer_model(), tmp_path / "published/tokenizer.model")
    published = CuMoPipeline.from_pretrained(tmp_path / "published", device="cpu")
    assert published.generate(CONVERSATIONS, GREEDY) == pipeline.generate(CONVERSATIONS, GREEDY)


@pytest.mark.slow
def test_compiled(pipeline):
    compiled = CuMoPipeline(pipeline.model, pipeline.processor, compile=True)
    assert compiled.generate(CONVERSATIONS, GREEDY) == pipeline.generate(CONVERSATIONS, GREEDY)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder, dtype):
    pipeline = CuMoPipeline.from_pretrained(folder, dtype=dtype, device="cpu")
    assert pipeline.model.dtype == getattr(torch, dtype)
    completions = pipeline.generate(CONVERSATIONS, GREEDY)
    assert all(completion.text for completion in completions)


def test_a_conversation_encodes_its_picture_once(pipeline, monkeypatch):
    pipeline.features.clear()
    encoded = []
    encode = pipeline.model.get_image_features
    monkeypatch.setattr(
        pipeline.model, "get_image_features", lambda *a, **k: encoded.append(len(k["pixel_values"])) or encode(*a, **k)
    )
    conversation = ask("What is this?", picture(8))
    for question in ("And its colour?", "Why?"):
        (completion,) = pipeline.generate([conversation], GREEDY)
        conversation = [
            *conversation,
            {"role": "assistant", "content": completion.text},
            {"role": "user", "content": question},
        ]
    assert encoded == [1]


def test_sampling_depends_on_the_seed_and_not_on_the_batch(pipeline):
    options = [
        GenerationOptions(max_new_tokens=12, temperature=1.0, seed=1),
        GenerationOptions(max_new_tokens=4, temperature=0.7, top_p=0.9, seed=2),
        GREEDY,
        GenerationOptions(max_new_tokens=12, temperature=2.0, seed=1),
        GenerationOptions(max_new_tokens=12, temperature=1.0, top_p=1e-9, seed=7),
    ]
    batched = pipeline.generate(CONVERSATIONS, options)
    alone = [pipeline.generate([pair[0]], pair[1])[0] for pair in zip(CONVERSATIONS, options, strict=True)]
    assert alone == batched
    assert [completion.completion_tokens for completion in batched] == [12, 4, 16, 12, 12]
    greedy = pipeline.generate([CONVERSATIONS[4]], replace(GREEDY, max_new_tokens=12))[0]
    assert batched[4] == greedy  # the most probable token alone is below top_p
    for options_near_zero in ({"temperature": 1e-300}, {"temperature": 100.0, "top_p": 1e-300}):
        cold = GenerationOptions(max_new_tokens=12, seed=1, **options_near_zero)
        assert pipeline.generate([CONVERSATIONS[4]], cold)[0] == greedy
    hot = replace(options[0], temperature=5.0)
    answers = {pipeline.generate([CONVERSATIONS[0]], replace(hot, seed=seed))[0].text for seed in range(4)}
    assert len(answers) == 4
    unseeded = replace(hot, seed=None)
    assert pipeline.generate([CONVERSATIONS[0]], unseeded) != pipeline.generate([CONVERSATIONS[0]], unseeded)


def test_stop_strings_end_an_answer_before_them(pipeline):
    (full,) = pipeline.generate([CONVERSATIONS[1]], GREEDY)
    assert len(full.text) > 12
    stop = full.text[6:10]
    expected = full.text[: full.text.index(stop)].strip()
    options = replace(GREEDY, stop=["never in it", stop])
    stopped, other = pipeline.generate([CONVERSATIONS[1], CONVERSATIONS[0]], [options, GREEDY])
    assert (stopped.text, stopped.finish_reason) == (expected, "stop")
    assert stopped.completion_tokens < full.completion_tokens
    assert other == pipeline.generate([CONVERSATIONS[0]], GREEDY)[0]
    assert "".join(pipeline.stream(CONVERSATIONS[1], options)) == expected


def test_the_end_token_ends_an_answer(pipeline, monkeypatch):
    (full,) = pipeline.generate([CONVERSATIONS[1]], GREEDY)
    row = pipeline.prepare(CONVERSATIONS[1], GREEDY)
    tokens = []
    push = row.push
    monkeypatch.setattr(row, "push", lambda token, eos: tokens.append(token) or push(token, eos))
    pipeline.run([row])
    index = next(i for i in range(3, 16) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(pipeline, "_eos_ids", frozenset({tokens[index]}))
    (ended,) = pipeline.generate([CONVERSATIONS[1]], GREEDY)
    assert (ended.finish_reason, ended.completion_tokens) == ("stop", index + 1)
    assert full.text.startswith(ended.text)
    assert full.finish_reason == "length"


def test_closing_a_stream_frees_the_model(pipeline, monkeypatch):
    rows = []
    run = pipeline.run
    monkeypatch.setattr(pipeline, "run", lambda batch: rows.extend(batch) or run(batch))
    stream = pipeline.stream(CONVERSATIONS[0], GenerationOptions(max_new_tokens=10_000))
    assert next(stream)
    stream.close()
    assert rows[0].completion().finish_reason == "cancelled"
    assert rows[0].tokens < 5_000
    assert pipeline.generate([CONVERSATIONS[0]], GREEDY)[0].text
    assert not [thread for thread in threading.enumerate() if thread.name == "cumo-stream"]


def test_a_cancelled_row_leaves_the_others_alone(pipeline):
    rows = [pipeline.prepare(conversation, GREEDY) for conversation in CONVERSATIONS[:2]]
    pushed = rows[0].push
    rows[0].push = lambda token, eos: (rows[0].cancel() if rows[0].tokens == 3 else None, pushed(token, eos))
    pipeline.run(rows)
    cancelled, other = (row.completion() for row in rows)
    assert (cancelled.finish_reason, cancelled.completion_tokens) == ("cancelled", 4)
    assert other == pipeline.generate([CONVERSATIONS[1]], GREEDY)[0]


def test_an_error_while_streaming_reaches_the_reader(pipeline, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pipeline.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pipeline.stream(CONVERSATIONS[0], GREEDY))
    monkeypatch.undo()
    assert pipeline.generate([CONVERSATIONS[0]], GREEDY)[0].text


def test_threads_take_turns(pipeline):
    expected = pipeline.generate(CONVERSATIONS, GREEDY)
    answers = [None] * len(CONVERSATIONS)

    def work(index):
        answers[index] = pipeline.generate([CONVERSATIONS[index]], GREEDY)[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(CONVERSATIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_the_context_limits_an_answer(pipeline, monkeypatch):
    (full,) = pipeline.generate([CONVERSATIONS[0]], GREEDY)
    monkeypatch.setattr(pipeline.model.config.text_config, "max_position_embeddings", full.prompt_tokens + 5)
    (short,) = pipeline.generate([CONVERSATIONS[0]], GREEDY)
    assert (short.finish_reason, short.completion_tokens) == ("length", 5)
    monkeypatch.setattr(pipeline.model.config.text_config, "max_position_embeddings", full.prompt_tokens)
    with pytest.raises(ValueError, match=f"prompt below the {full.prompt_tokens} tokens of the model, got"):
        pipeline.generate([CONVERSATIONS[0]], GREEDY)


def test_nothing_to_answer(pipeline):
    assert pipeline.generate([]) == []


def test_pictures_from_files(pipeline, tmp_path):
    picture(1).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        answers = {pipeline.generate([ask("What?", image)], GREEDY)[0].text for image in (picture(1), opened)}
    conversation = ask("What?", picture(1))
    conversation[0]["content"][1]["image"] = str(tmp_path / "a.png")
    answers.add(pipeline.generate([conversation], GREEDY)[0].text)
    assert len(answers) == 1
    conversation[0]["content"][1]["image"] = "http://example.invalid/a.png"
    with pytest.raises(ValueError, match="image: expected a picture or the path of a file, got 'http"):
        pipeline.generate([conversation], GREEDY)


def test_options_for_each_conversation(pipeline):
    with pytest.raises(ValueError, match="options: expected 2, one for each conversation, got 1"):
        pipeline.generate(CONVERSATIONS[:2], [GREEDY])


def test_a_processor_of_another_model(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.processor, "image_seq_length", 4)
    with pytest.raises(ValueError, match="processor: expected image_seq_length=16 of the model, got 4"):
        CuMoPipeline(pipeline.model, pipeline.processor)


def test_time_to_the_first_piece_is_not_that_of_the_answer(pipeline):
    """Pieces come while the answer is being made, not at its end."""
    begin = time.monotonic()
    times = [time.monotonic() - begin for _ in pipeline.stream(CONVERSATIONS[0], replace(GREEDY, max_new_tokens=200))]
    assert len(times) > 50
    assert times[0] < times[-1] / 2


@pytest.mark.parametrize("name", ["runs/mistral-7b/instruct/final", "/absent", "absent", "./absent"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"name: expected a folder, or a model of the hub as owner/name, got '{name}'"):
        CuMoPipeline.from_pretrained(name)
