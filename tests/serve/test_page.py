# SPDX-License-Identifier: Apache-2.0
"""The page in a headless Chromium: drop a picture, ask, see the answer come and where the patches went.

Skipped where no Chromium is installed; none is downloaded.
"""

import base64
import shutil

import pytest

from cumo.inference import GenerationOptions, picture_routing
from cumo.serve.limits import Limits
from tests.inference.tiny import ask, dense_pipeline, picture
from tests.serve.serving import data_url, serving, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium that is installed already"),
]
# What dropping a file does: events on the place, with a file in them.
DROP = """
([content, name, type]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  const target = document.getElementById("messages");
  for (const kind of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer }));
  }
}
"""
# Every text that the answer had, in order.
WATCH = """
() => {
  window.seen = [];
  new MutationObserver(() => {
    const texts = document.querySelectorAll(".message.assistant .text");
    if (texts.length) window.seen.push(texts[texts.length - 1].textContent);
  }).observe(document.getElementById("messages"), { subtree: true, childList: true, characterData: true });
}
"""


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(pipeline):
    with serving(pipeline, Limits(max_tokens=100_000, max_batch_tokens=10**9)) as server:
        yield server


@pytest.fixture
def open_page(browser):
    """Opens the page; at the end it must have asked nobody but its server, and have met no error."""
    pages = []

    def open_it(server):
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(20_000)
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        pages.append((page, server))
        return page

    yield open_it
    for page, server in pages:
        assert all(url.startswith((server.url, "data:", "blob:")) for url in page.asked)
        refused = [error for error in page.errors if "the server responded with a status of 4" not in error]
        assert refused == []
        page.close()


def percent(share):
    """As the page writes it."""
    return f"{int(100 * share + 0.5)} %"


def drop(page, image, name="a.png", kind="image/png"):
    content = data_url(image).partition(",")[2] if kind == "image/png" else base64.b64encode(image).decode()
    page.evaluate(DROP, [content, name, kind])


def put(page, question, tokens=12, temperature=0):
    """Ask, with the settings given."""
    page.evaluate(
        "([t, n]) => { temperature.value = t; document.getElementById('max-tokens').value = n; }", [temperature, tokens]
    )
    page.fill("#question", question)
    page.press("#question", "Enter")


def answers(page):
    page.wait_for_selector(".message.assistant:not(.busy)")
    page.wait_for_function("() => !document.querySelector('.message.assistant.busy')")
    return page.locator(".message.assistant .text").all_inner_texts()


def test_a_conversation_about_a_dropped_picture(open_page, server, pipeline):
    page = open_page(server)
    page.wait_for_function("() => document.getElementById('model').textContent.includes('4 experts')")
    page.evaluate(WATCH)
    drop(page, picture(5))
    page.wait_for_selector("#attached img")
    assert page.locator("#drop").is_hidden()
    put(page, "What is this?", tokens=400)
    (first,) = answers(page)
    (expected,) = pipeline.generate(
        [[{"role": "user", "content": ask(picture(5), "What is this?")[0]["content"]}]],
        GenerationOptions(max_new_tokens=400),
    )
    assert first == expected.text
    seen = [text for text in page.evaluate("window.seen") if text]
    assert len(set(seen)) > 5  # it came piece by piece
    assert all(first.startswith(text) for text in seen)
    assert page.locator(".message.user img").count() == 1
    assert page.locator("#attached img").count() == 0
    put(page, "And now?")
    second = answers(page)[1]
    conversation = [*ask(picture(5), "What is this?"), {"role": "assistant", "content": first}, *ask("And now?")]
    assert second == pipeline.generate([conversation], GenerationOptions(max_new_tokens=12))[0].text
    page.click("#new")
    assert page.locator(".message").count() == 0
    assert page.locator("#maps").is_hidden()
    until(server.is_idle)


def test_the_panel_shows_the_maps_of_the_picture(open_page, server, pipeline):
    page = open_page(server)
    drop(page, picture(6))
    page.wait_for_selector("#maps:not([hidden])")
    routing = picture_routing(pipeline, picture(6))
    maps = [*routing.vision, routing.connector]
    titles = page.locator("#sources button").all_inner_texts()
    assert titles == ["Whole picture", "3 × 3 tiles", "Connector"]
    for source, grid in enumerate(maps):
        page.locator("#sources button").nth(source).click()
        for choice in range(2):
            page.locator("#choices button").nth(choice).click()
            for layer in range(len(grid.experts)):
                page.locator("#load button").nth(layer).click()
                assert page.locator("#layer-value").inner_text() == f"{layer + 1} of {len(grid.experts)}"
                shares = (
                    grid.experts[layer, choice].flatten().bincount(minlength=4) / grid.experts[layer, choice].numel()
                )
                expected = [f"Expert {expert + 1}: {percent(share)}" for expert, share in enumerate(shares.tolist())]
                assert page.locator("#legend button").all_inner_texts() == expected
                load = page.locator("#load button").nth(layer).get_attribute("aria-label")
                assert f"expert 1 {percent(float(grid.load[layer, 0]))}" in load
                # the patch under the pointer, at the upper right
                size, side = page.locator("#overlay").bounding_box()["width"], grid.experts.shape[-1]
                page.hover("#overlay", position={"x": size * (side - 0.5) / side, "y": size * 0.5 / side})
                expert, weight = (value[layer, 0, 0, side - 1] for value in (grid.experts, grid.weights))
                weight = round(float(weight) * 255) / 255
                patch = page.locator("#patch").inner_text()
                assert patch.startswith(f"Patch in row 1, column {side}: expert {expert + 1} ({percent(weight)}), then")


def test_colours_lie_where_the_experts_are(open_page, server, pipeline):
    page = open_page(server)
    drop(page, picture(6))
    page.wait_for_selector("#maps:not([hidden])")
    page.evaluate("() => { strength.value = 100; strength.dispatchEvent(new Event('input')); }")
    page.locator("#load button").nth(0).click()
    grid = picture_routing(pipeline, picture(6)).vision[0]
    side = grid.experts.shape[-1]
    pixels = page.evaluate(
        """(side) => {
          const canvas = document.getElementById("overlay"), context = canvas.getContext("2d");
          const at = (index) => Math.floor(((index + 0.5) * canvas.width) / side);
          const pixel = (index) => context.getImageData(at(index % side), at(Math.floor(index / side)), 1, 1).data;
          return [...Array(side * side).keys()].map((index) => [...pixel(index)]);
        }""",
        side,
    )
    palette = [(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)]
    for pixel, expert, weight in zip(
        pixels, grid.experts[0, 0].flatten().tolist(), grid.weights[0, 0].flatten().tolist(), strict=True
    ):
        alpha = 0.4 + 0.6 * weight
        # what the colour of the expert leaves, which is grey: the same in each channel
        rest = [value - alpha * part for value, part in zip(pixel[:3], palette[expert], strict=True)]
        assert max(rest) - min(rest) < 6


def test_stopping_an_answer(open_page, server):
    page = open_page(server)
    put(page, "Hello", tokens=100_000)
    page.wait_for_function("() => document.querySelector('.message.assistant .text')?.textContent.length > 20")
    page.click("#stop")
    page.wait_for_selector(".message.assistant:not(.busy) .note")
    assert page.locator(".note").inner_text() == "Stopped."
    until(server.is_idle)
    put(page, "And?")
    assert answers(page)[1]


def test_errors_are_shown_and_the_question_is_kept(open_page, server):
    page = open_page(server)
    drop(page, b"this is no picture", kind="image/jpeg", name="a.jpg")
    page.wait_for_function(
        "() => document.getElementById('panel-state').textContent.includes('expected a picture in one of')"
    )
    put(page, "What is this?")
    page.wait_for_selector(".error")
    assert "image_url: expected a picture in one of the formats PNG" in page.locator(".error").inner_text()
    assert page.input_value("#question") == "What is this?"
    assert page.locator("#attached img").count() == 1
    page.click(".remove")
    page.press("#question", "Enter")
    assert answers(page)[-1]
    drop(page, b"text", kind="text/plain", name="notes.txt")
    page.wait_for_function("() => document.querySelectorAll('.error').length === 2")
    assert page.locator(".error").nth(1).inner_text() == "notes.txt is no picture."


def test_answers_are_text_and_never_markup(open_page, server, pipeline, monkeypatch):
    def stream(rows):
        for row in rows:
            row._on_text("<img src=x onerror=alert(1)><b>bold</b>")
            row._finish("stop")

    page = open_page(server)
    monkeypatch.setattr(pipeline, "run", stream)
    put(page, "<i>Hello</i>")
    assert answers(page) == ["<img src=x onerror=alert(1)><b>bold</b>"]
    assert page.locator(".message.user .text").inner_text() == "<i>Hello</i>"
    assert page.locator("#messages b, #messages i, #messages img").count() == 0


def test_the_key_is_asked_for(open_page, pipeline):
    with serving(pipeline, api_key="secret") as server:
        page = open_page(server)
        page.wait_for_function("() => document.getElementById('model').textContent.includes('(see Settings)')")
        page.click("#settings summary")
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_function("() => document.getElementById('model').textContent.includes('4 experts')")
        put(page, "Hello")
        assert answers(page)[0]


def test_a_dense_model_has_nothing_to_show(open_page, pipeline):
    with serving(dense_pipeline(pipeline)) as server:
        page = open_page(server)
        drop(page, picture())
        page.wait_for_function("() => document.getElementById('panel-state').textContent.includes('are dense')")
        assert page.locator("#maps").is_hidden()
        assert "dense encoder, dense connector" in page.locator("#model").inner_text()


def test_a_busy_server_is_named(open_page, pipeline):
    with serving(pipeline, Limits(max_batch_size=1, max_queue=0)) as server:
        slots = server.app.state.slots
        slots.taken = slots.count
        page = open_page(server)
        put(page, "Hello")
        page.wait_for_selector(".error")
        assert "the server is busy with 1 requests; try again soon" in page.locator(".error").inner_text()
        slots.taken = 0
        page.press("#question", "Enter")
        assert answers(page)[-1]
