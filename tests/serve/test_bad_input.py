# SPDX-License-Identifier: Apache-2.0
"""Malformed requests get a 4xx with a sentence, pictures of every legitimate kind an answer; the server goes on."""

import base64
import http.client
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cumo.inference import GenerationOptions
from cumo.inference.fetch import FetchError
from cumo.serve.limits import Limits
from tests.inference.tiny import ask, picture
from tests.serve.serving import data_url, serving, user

PNG = data_url(picture())


@pytest.fixture(scope="module", autouse=True)
def _the_server_goes_on(server, pipeline):
    """After all of it the same answer as ever, and nothing left behind."""
    yield
    status, body = server.chat({"messages": [user("What?", picture())], "temperature": 0, "max_tokens": 4})
    assert status == 200
    expected = pipeline.generate([ask("What?", picture())], GenerationOptions(max_new_tokens=4))[0].text
    assert body["choices"][0]["message"]["content"] == expected
    assert server.is_idle()


def refused(server, body, status, sentence, param=None, **headers):
    """The answer is an error in OpenAI's shape."""
    actual, content = server.chat(body, **headers)
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    message = content["error"]["message"]
    assert sentence in message
    assert actual == status
    assert len(message) < 500
    if param is not None:
        assert content["error"]["param"] == param


def chat(**fields):
    return {"messages": [user("Hello")], "max_tokens": 2, "temperature": 0} | fields


def shown(url):
    return chat(messages=[user("What?", (url,))])


def png_header(width, height):
    """A PNG that says it is large, and is not."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def animation(file_format):
    file = io.BytesIO()
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(file, file_format, save_all=True, append_images=frames[1:])
    return data_url(file.getvalue(), file_format)


IMAGE = "messages[0].content[1].image_url"
BAD_PICTURES = [
    pytest.param(lambda: PNG[:-41], 400, "the base64 is damaged or cut off", id="truncated-base64"),
    pytest.param(lambda: PNG[:-60] + "!" * 60, 400, "the base64 is damaged or cut off", id="no-base64"),
    pytest.param(lambda: PNG[: len(PNG) // 8 * 4 + 2], 400, "damaged or cut off", id="half-a-file"),
    pytest.param(lambda: data_url(b"hello"), 400, "expected a picture in one of the formats PNG", id="text-as-picture"),
    pytest.param(lambda: data_url(b""), 400, "expected a picture in one of the formats", id="empty-file"),
    pytest.param(lambda: data_url(png_header(40000, 40000)), 413, "pixels, got", id="40000x40000"),
    pytest.param(lambda: data_url(png_header(12000, 12000)), 413, "pixels, got", id="above-the-warning-of-pillow"),
    pytest.param(lambda: data_url(png_header(8000, 8000)), 413, "pixels, got 8000 x 8000", id="64-million-pixels"),
    pytest.param(lambda: data_url(png_header(40000, 100)), 413, "expected sides up to 8192 pixels", id="long-and-thin"),
    pytest.param(lambda: data_url(png_header(0, 7)), 400, "expected a picture in one of", id="no-width"),
    pytest.param(lambda: data_url(png_header(64, 64)), 400, "damaged or cut off", id="pixels-missing"),
    pytest.param(lambda: animation("GIF"), 400, "got an animation of 3 frames", id="animated-gif"),
    pytest.param(lambda: animation("WEBP"), 400, "got an animation of 3 frames", id="animated-webp"),
    pytest.param(lambda: animation("PNG"), 400, "got an animation of 3 frames", id="animated-png"),
    pytest.param(lambda: data_url(picture(), "TIFF"), 400, "expected a picture in one of the formats", id="tiff"),
    pytest.param(lambda: "data:text/plain;base64,aGVsbG8=", 400, "expected data:image/", id="text-url"),
    pytest.param(lambda: "data:image/png,abc", 400, "expected data:image/", id="no-base64-url"),
    pytest.param(lambda: "", 400, "expected a data URL", id="empty-url"),
    pytest.param(lambda: "file:///etc/passwd", 400, "expected a data URL", id="file-url"),
    pytest.param(lambda: "/etc/passwd", 400, "expected a data URL", id="path"),
    pytest.param(lambda: "http://127.0.0.1/a.png", 400, "fetches no addresses", id="web-address"),
]


@pytest.mark.parametrize(("url", "status", "sentence"), BAD_PICTURES)
def test_bad_pictures(server, url, status, sentence):
    refused(server, shown(url()), status, sentence, param=IMAGE)


COLOUR = np.stack(np.meshgrid(np.arange(16) * 17, np.arange(16) * 17, [128]), axis=-1)[:, :, 0].astype(np.uint8)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return data_url(Image.fromarray(COLOUR).transpose(Image.Transpose.ROTATE_90), exif=exif)


GREY = COLOUR[:, :, 0]
GOOD_PICTURES = [
    pytest.param(lambda: data_url(Image.fromarray(COLOUR), "GIF"), lambda: None, id="gif"),
    pytest.param(
        lambda: data_url(Image.fromarray(COLOUR), "WEBP", lossless=True), lambda: Image.fromarray(COLOUR), id="webp"
    ),
    pytest.param(lambda: data_url(Image.fromarray(COLOUR), "BMP"), lambda: Image.fromarray(COLOUR), id="bmp"),
    pytest.param(lambda: data_url(Image.fromarray(COLOUR).convert("CMYK"), "JPEG"), lambda: None, id="cmyk"),
    pytest.param(
        lambda: data_url(Image.fromarray(GREY.astype(np.uint16) * 257)),
        lambda: Image.fromarray(GREY).convert("RGB"),
        id="16-bit",
    ),
    pytest.param(rotated, lambda: Image.fromarray(COLOUR), id="turned-by-exif"),
    pytest.param(
        lambda: data_url(Image.fromarray(COLOUR).convert("RGBA")), lambda: Image.fromarray(COLOUR), id="transparency"
    ),
    pytest.param(
        lambda: data_url(Image.fromarray(COLOUR).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)),
        lambda: Image.fromarray(COLOUR),
        id="palette",
    ),
    pytest.param(lambda: PNG.replace("image/png", "image/jpeg"), lambda: picture(), id="declared-as-another"),
    pytest.param(lambda: PNG.replace(";", ";name=a.png;", 1), lambda: picture(), id="with-parameters"),
    pytest.param(lambda: PNG[:60] + "\r\n" + PNG[60:], lambda: picture(), id="broken-into-lines"),
    pytest.param(lambda: PNG, lambda: picture(), id="png"),
    pytest.param(lambda: data_url(Image.new("RGB", (1, 1))), lambda: Image.new("RGB", (1, 1)), id="one-pixel"),
    pytest.param(lambda: data_url(Image.new("L", (8000, 3))), lambda: None, id="long-within-the-limit"),
]


@pytest.mark.parametrize(("url", "same_as"), GOOD_PICTURES)
def test_legitimate_pictures(server, pipeline, url, same_as):
    status, body = server.chat(shown(url()) | {"max_tokens": 6})
    assert status == 200, body
    content = body["choices"][0]["message"]["content"]
    assert content
    if (image := same_as()) is not None:
        expected = pipeline.generate([ask("What?", image)], GenerationOptions(max_new_tokens=6))[0].text
        assert content == expected


BAD_FIELDS = [
    ({"temperature": -0.5}, "temperature", "greater than or equal to 0, got -0.5"),
    ({"temperature": 3}, "temperature", "less than or equal to 2, got 3"),
    ({"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
    ({"top_p": 0}, "top_p", "greater than 0, got 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
    ({"max_tokens": -3}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": "many"}, "max_tokens", "valid integer, got 'many'"),
    ({"max_tokens": 10**6}, "max_tokens", "expected up to 2048, got 1000000"),
    ({"max_completion_tokens": 10**6}, None, "expected up to 2048, got 1000000"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 100}, "n", "expected up to 8, got 100"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"seed": 2**70}, "seed", "seed: "),
    ({"stop": 3}, "stop", "expected a string or up to 4 strings"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"stop": ["a"] * 5}, "stop", "expected a string or up to 4 strings"),
    ({"stream": "yes"}, "stream", "valid boolean, got 'yes'"),
    ({"model": "gpt-4o"}, "model", "model: expected 'cumo', got 'gpt-4o'"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "this server does not support it"),
    ({"tools": [{"type": "function"}]}, "tools", "this server does not support it"),
    ({"response_format": {"type": "json_object"}}, "response_format", "this server does not support it"),
    ({"logprobs": True}, "logprobs", "this server does not support it"),
    ({"temprature": 1}, "temprature", "unsupported field, got 1"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hello"}, "messages", "valid list, got 'hello'"),
    ({"messages": ["hello"]}, "messages[0]", "messages[0]: "),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role", "'user' or 'assistant', got 'wizard'"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "got 'tool'"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "expected it to be there, got nothing"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "expected it to be there"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "expected a string or a list of parts"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "expected a string or a list of parts"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "expected a string or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, None, "messages[0].content[0]: "),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, None, "expected it to be there"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, "expected it to be there"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None, "image_url"),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, "messages", "the chat template refuses them"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "expected user to speak last"),
    (
        {"messages": [user("a"), {"role": "system", "content": "b"}, user("c")]},
        None,
        "system as the first message only",
    ),
    (
        {"messages": [user("a"), {"role": "assistant", "content": user(picture())["content"]}, user("c")]},
        None,
        "pictures",
    ),
    ({"messages": [user("a")] * 257}, "messages", "expected up to 256, got 257"),
    ({"messages": [user(*[picture()] * 9)]}, None, "messages (pictures): expected up to 8, got 9"),
]


@pytest.mark.parametrize(("fields", "param", "sentence"), BAD_FIELDS, ids=[str(case[0])[:50] for case in BAD_FIELDS])
def test_bad_fields(server, fields, param, sentence):
    status = 404 if "model" in fields else 400
    refused(server, chat(**fields), status, sentence, param)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "the body is no JSON"),
        (b"{", 400, "the body is no JSON"),
        (b"[1, 2]", 400, "expected a JSON object with messages"),
        (b"null", 400, "expected a JSON object with messages"),
        (b'{"temperature": NaN, "messages": []}', 400, "NaN is no JSON"),
        (b"\xff\xfe\x00", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "nested too deep"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages[0].content"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is no JSON"),
    ],
    ids=["empty", "half", "list", "null", "nan", "no-utf8", "deep", "surrogate", "huge-number"],
)
def test_bodies_that_are_no_requests(server, body, status, sentence):
    refused(server, body, status, sentence, content_type="application/json")


def test_only_json(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""):
        refused(server, json.dumps(chat()).encode(), 415, "expected Content-Type application/json", content_type=kind)


def test_ten_megabytes_of_prompt(server):
    refused(
        server,
        chat(messages=[user("word " * 2_000_000)]),
        400,
        "messages (bytes of text): expected up to 1048576, got 10000000",
    )


def test_a_prompt_beyond_the_context(server, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.model.config.text_config, "max_position_embeddings", 100)
    status, body = server.chat(chat(messages=[user("word " * 1000)]))
    assert status == 400
    assert body["error"]["code"] == "context_length_exceeded"
    assert "expected a prompt below the 100 tokens of the model, got 1" in body["error"]["message"]


def test_a_body_beyond_the_limit(pipeline):
    with serving(pipeline, Limits(max_body_bytes=1000, max_image_bytes=300)) as server:
        refused(server, chat(user="x" * 2000), 413, "expected a body of up to 1000 bytes, got 2")
        refused(server, shown("data:image/png;base64," + "A" * 600), 413, "expected up to 300 bytes, got 450", IMAGE)

        def pieces():
            for _ in range(20):
                yield b"x" * 100

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(
            "POST",
            "/v1/chat/completions",
            pieces(),
            {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
            encode_chunked=True,
        )
        response = connection.getresponse()
        assert response.status == 413
        assert b"expected a body of up to 1000 bytes, got more" in response.read()
        connection.close()


def test_paths_and_methods_that_are_not_there(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("PUT", "/", 405)):
        actual, _, body = server.request(method, path)
        assert actual == status
        assert json.loads(body)["error"]["message"]
    assert server.request("GET", "/assets/..%2fapp.py")[0] == 404
    assert server.request("GET", "/docs")[0] == 404


def test_names_that_are_not_this_server(server):
    """As a web page would ask whose own name resolves to this machine."""
    status, _, body = server.request("GET", "/v1/models", host="evil.example:8000")
    assert status == 403
    assert b"not to be asked under that name" in body
    for host in (f"localhost:{server.port}", f"127.0.0.1:{server.port}", "[::1]:80", "LOCALHOST"):
        assert server.request("GET", "/v1/models", host=host)[0] == 200


def test_pictures_of_the_web_where_they_are_allowed(pipeline):
    asked = []

    def fetch(url, **limits):
        asked.append((url, limits))
        if "private" in url:
            raise FetchError("private.test: expected a host of the public internet, got one with the address 10.0.0.1")
        return base64.b64decode(PNG.partition(",")[2]) if "png" in url else b"<html>"

    with serving(pipeline, allow_urls=True, fetch=fetch) as server:
        status, body = server.chat(shown("https://example.test/a.png"))
        expected = pipeline.generate([ask("What?", picture())], GenerationOptions(max_new_tokens=2))[0].text
        assert (status, body["choices"][0]["message"]["content"]) == (200, expected)
        refused(server, shown("http://private.test/a.png"), 400, "expected a host of the public internet", IMAGE)
        refused(server, shown("http://example.test/a.html"), 400, "expected a picture in one of the formats", IMAGE)
        limits = {"max_bytes": Limits().max_image_bytes, "timeout": Limits().fetch_seconds}
        assert asked[0] == ("https://example.test/a.png", limits)
    with serving(pipeline, allow_urls=True) as server:  # the real one
        for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1"):
            refused(server, shown(f"http://{host}:{server.port}/health"), 400, "expected a host of the public internet")
