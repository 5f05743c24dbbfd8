# SPDX-License-Identifier: Apache-2.0
"""The endpoints that are not OpenAI's: maps of experts, the page's files, health, metrics; and what responses carry."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cumo.inference import picture_routing
from cumo.serve.guard import host_name
from cumo.serve.limits import Limits
from tests.inference.tiny import picture
from tests.serve.serving import data_url, serving, user

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def documented_grids():
    """The function that the documentation gives to readers of the maps."""
    (function,) = re.findall(r"^def grids\(.*?(?=\n\n)", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    names = {"base64": base64, "np": np}
    exec(function, names)
    return names["grids"]


def test_maps_of_experts(server, pipeline):
    status, _, content = server.request("POST", "/cumo/routing", {"image": data_url(picture(9))})
    assert status == 200
    body = json.loads(content)
    routing = picture_routing(pipeline, picture(9))
    assert [maps["scale"] for maps in body["vision"]] == [1, 3]
    for maps, expected in zip([*body["vision"], body["connector"]], [*routing.vision, routing.connector], strict=True):
        experts, weights = documented_grids()(maps)
        assert np.array_equal(experts, expected.experts.numpy())
        assert np.abs(weights - expected.weights.numpy()).max() <= 0.5 / 255 + 1e-6
        assert np.abs(np.array(maps["load"]) - expected.load.numpy()).max() < 1e-4
        assert maps["num_experts"] == 4
    shown = Image.open(io.BytesIO(base64.b64decode(body["picture"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), np.asarray(routing.picture))


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({}, 400, "image: expected it to be there"),
        ({"image": 3}, 400, "image: input should be a valid string"),
        ({"image": "x"}, 400, "image: expected a data URL"),
        ({"image": data_url(b"text")}, 400, "image: expected a picture in one of the formats"),
        (b"{", 400, "the body is no JSON"),
    ],
)
def test_maps_of_what_is_no_picture(server, body, status, sentence):
    actual, _, content = server.request("POST", "/cumo/routing", body, content_type="application/json")
    assert actual == status
    assert sentence in json.loads(content)["error"]["message"]
    assert server.is_idle()


def test_the_page_is_self_contained(server):
    status, headers, content = server.request("GET", "/")
    assert status == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    page = content.decode()
    paths = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(paths) >= 4
    pending, seen = set(paths), set()
    while pending:
        path = pending.pop()
        seen.add(path)
        assert path.startswith("/assets/"), path
        status, headers, content = server.request("GET", path)
        assert status == 200
        text = content.decode()
        addresses = [url for url in re.findall(r"https?://[^\s\"'`)]+", text) if url != "http://www.w3.org/2000/svg"]
        assert addresses == []
        imports = re.findall(r'from "\./([^"]+)"', text)
        pending |= {f"/assets/{name}" for name in imports} - seen
    assert {"/assets/app.js", "/assets/api.js", "/assets/maps.js", "/assets/page.css", "/assets/icon.svg"} <= seen


def test_what_the_page_learns_of_the_model(server):
    body = json.loads(server.request("GET", "/cumo/model")[2])
    assert body["vision"] == {"experts": 4, "choices": 2, "layers": 2}
    assert body["scales"] == [1, 3]
    assert body["limits"]["tokens"] == Limits().max_tokens


def test_health_and_its_end(pipeline):
    with serving(pipeline) as server:
        assert server.request("GET", "/health")[0] == 200
        server.app.state.scheduler.close(timeout=10)
        status, _, content = server.request("GET", "/health")
        assert (status, json.loads(content)["status"]) == (503, "stopped")


def test_metrics_count(pipeline):
    pipeline.features.clear()
    with serving(pipeline) as server:
        for seed in (1, 1):
            assert server.chat({"messages": [user("a", picture(seed))], "max_tokens": 3})[0] == 200
        server.chat({"messages": []})
        text = server.request("GET", "/metrics")[2].decode()
        assert 'cumo_requests_total{path="/v1/chat/completions",status="200"} 2.0' in text
        assert 'cumo_requests_total{path="/v1/chat/completions",status="400"} 1.0' in text
        assert 'cumo_completions_total{finish_reason="length"} 2.0' in text
        assert server.metric("cumo_completion_tokens_total") == 6
        assert server.metric("cumo_time_to_first_token_seconds_count") == 2
        assert server.metric("cumo_picture_cache_bytes") == pipeline.features.bytes > 0
        for path in ("/a", "/b", "/v1/models/x"):  # names of clients are no labels
            server.request("GET", path)
        assert 'path="other",status="404"} 3.0' in server.request("GET", "/metrics")[2].decode()


def test_the_description_of_the_interface(server):
    paths = json.loads(server.request("GET", "/openapi.json")[2])["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in schema["properties"]


@pytest.mark.parametrize(
    ("host", "name"), [("a.b:80", "a.b"), ("A.b", "a.b"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]"), ("", "")]
)
def test_names_of_hosts(host, name):
    assert host_name(host) == name


def test_every_limit_is_documented():
    text = DOCS.read_text()
    for name in Limits.__dataclass_fields__:
        assert name.replace("_", "-") in text, name
