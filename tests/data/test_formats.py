# SPDX-License-Identifier: Apache-2.0
"""Both formats of rows, and everything that may be wrong with one."""

import pytest

from cumo.data.formats import parse_json, parse_row
from tests.data.samples import llava


def turns(*values):
    """LLaVA's, beginning with the human."""
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def messages(*contents, system=None):
    """OpenAI's."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


IMAGE = {"type": "image"}
Q, P = {"type": "text", "text": "q"}, {"type": "text", "text": "p"}


@pytest.mark.parametrize(
    ("row", "expected_turns", "system", "images"),
    [
        pytest.param({"conversations": turns("q", "a")}, turns("q", "a"), None, [], id="text"),
        pytest.param(llava(images="a.png"), turns("<image>q", "yes"), None, ["a.png"], id="one-picture"),
        pytest.param(llava(images=["a", "b"]), turns("<image><image>q", "yes"), None, ["a", "b"], id="two-pictures"),
        pytest.param(llava(images=None, image=None, images_="x"), turns("q", "yes"), None, [], id="no-picture"),
        pytest.param(llava(image=[]), turns("q", "yes"), None, [], id="empty-list"),
        pytest.param(llava(image=""), turns("q", "yes"), None, [], id="empty-string"),
        pytest.param(
            {"conversations": turns("hi", "hello", "q", "a")[1:]}, turns("q", "a"), None, [], id="assistant-first"
        ),
        pytest.param({"conversations": turns("q", "a", "r")}, turns("q", "a", "r"), None, [], id="question-last"),
        pytest.param(
            {"conversations": [{"from": "system", "value": "s"}, *turns("q", "a")]},
            turns("q", "a"),
            "s",
            [],
            id="system",
        ),
        pytest.param({"system": "s", "conversations": turns("q", "a")}, turns("q", "a"), "s", [], id="top-system"),
        pytest.param({"system": "", "conversations": turns("q", "a")}, turns("q", "a"), "", [], id="empty-system"),
        pytest.param(
            {"system": "s", "messages": messages("q", "a", system="s")}, turns("q", "a"), "s", [], id="system-twice"
        ),
        pytest.param({**llava(), "video": None}, turns("q", "yes"), None, [], id="no-video"),
        pytest.param(
            {"messages": messages("<image>\nq", "a", system="s"), "images": ["a"]},
            turns("<image>\nq", "a"),
            "s",
            ["a"],
            id="messages",
        ),
        pytest.param(
            {"messages": messages([IMAGE, Q, IMAGE, P], [Q]), "images": [{"path": "a"}, "b"]},
            turns("<image>\nq<image>\np", "q"),
            None,
            ["a", "b"],
            id="parts",
        ),
        pytest.param(
            {
                "messages": messages(
                    [{**IMAGE, "image": "a"}, Q], "a", [{"type": "image_url", "image_url": {"url": "b"}}]
                )
            },
            turns("<image>\nq", "a", "<image>\n"),
            None,
            ["a", "b"],
            id="pictures-in-parts",
        ),
    ],
)
def test_rows(row, expected_turns, system, images):
    sample = parse_row({"id": 7, "other": {}, **row})
    assert sample == (7, expected_turns, system, images)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object with conversations or messages, got []"),
        ({"id": 1}, "expected a list under conversations or messages, got keys ['id']"),
        ({"conversations": "q"}, "expected a list under conversations or messages"),
        ({"conversations": ["q"]}, "conversations[0]: expected an object, got 'q'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: expected a text as value or content, got None"),
        ({"conversations": [{"from": "robot", "value": "q"}]}, "[0]: expected human or gpt to speak, got 'robot'"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, "[0]: expected human or gpt to speak, got ['human']"),
        ({"messages": [*messages("q"), {"role": "system", "content": "s"}]}, "messages[1]: expected human or gpt"),
        ({"conversations": turns("q", "a")[:1] * 2}, "expected gpt to speak next, got human: 'q'"),
        ({"conversations": turns("q", "a")[1:] * 2}, "expected human to speak next, got gpt: 'a'"),
        ({"conversations": turns("q", " \n")}, "expected an answer to 'q', got an empty one"),
        ({"conversations": turns("q", "a", "r", "")}, "expected an answer to 'r', got an empty one"),
        ({"conversations": turns("q")}, "expected a question and an answer to learn, got no answer"),
        ({"conversations": []}, "expected a question and an answer to learn, got nothing"),
        ({"conversations": turns("", "a")[1:]}, "expected a question and an answer to learn, got nothing"),
        (llava("<image>"), "expected as many pictures as <image> in the text, got 0 for 1"),
        (llava("<image>", images="a"), "got 1 for 2"),
        (llava(image="a"), "got 1 for 0"),
        ({**llava(), "conversations": turns("<image>", "a", "q", "b")[1:], "image": "a"}, "got 1 for 0"),
        (llava(image="a", images=None) | {"images": ["b"]}, "under image or images, got both"),
        (llava(image=[3]), "images: expected the path of a picture, got 3"),
        (llava(image={"bytes": "x"}), "images: expected the path of a picture"),
        (llava(image=3), "images: expected the path of a picture, got 3"),
        (
            {"messages": messages([{"type": "audio"}], "a")},
            "messages[0]: expected parts of type text, image or image_url",
        ),
        ({"messages": messages(["q"], "a")}, "messages[0]: expected parts of type text"),
        ({"messages": messages([{"type": "text", "text": "<image>"}], "a")}, "expected pictures as parts of their own"),
        ({"messages": messages([{**IMAGE, "image": "a"}, IMAGE], "a"), "images": ["b"]}, "or all within the parts"),
        ({"messages": messages([{**IMAGE, "image": "a"}], "a"), "images": ["b"]}, "or all within the parts"),
        ({"messages": messages([{"type": "image_url", "image_url": 3}], "a")}, "messages[0]: expected"),
        ({"messages": messages([IMAGE], "a")}, "got 0 for 1"),
        ({"system": ["s"], "conversations": turns("q", "a")}, "system: expected a text, got ['s']"),
        (
            {"system": "t", "messages": messages("q", "a", system="s")},
            "system: expected one system prompt, got 't' and",
        ),
        ({**llava("<video>q"), "video": "a.mp4"}, "video: expected pictures and text only, got 'a.mp4'"),
        ({**llava("<video>q"), "videos": ["a.mp4"]}, "videos: expected pictures and text only, got ['a.mp4']"),
    ],
)
def test_faults(row, message):
    with pytest.raises(ValueError) as raised:
        parse_row(row)
    assert message in str(raised.value)


@pytest.mark.parametrize("raw", [b"{", b"", b'{"a" 1}', b"\xff{}", b"[" * 100_000, b'{"a": "\xe9"}'])
def test_what_is_no_json(raw):
    with pytest.raises(ValueError, match="broken JSON"):
        parse_json(raw)
