"""The status page in a real browser: of a server that decodes, and of one whose answers are made up."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from flashmemory_vllm.cli.server import MODEL_NAME, Server
from flashmemory_vllm.evaluation.vocabulary import BOS, encode
from flashmemory_vllm.observability.counters import SCHEDULER, CounterReader, CounterWriter, worker_name
from flashmemory_vllm.plugin.endpoints import FlashMemoryEndpoints
from flashmemory_vllm.plugin.status_reader import StatusReader
from tests.e2e.questions import make_questions
from tests.integration.plugin.statuses import STRIP, StatusEngine, make_request, make_status

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# One rectangle of a strip, as the page writes it.
RECTANGLE = re.compile(r"M(\d+) ([\d.]+)h(\d+)v")
PITCH, ROW_HEIGHT = 6, 15
# How long anything may take, and more tokens than can be generated meanwhile
PATIENCE_SECONDS = 120
MANY_TOKENS = 25_000
expect.set_options(timeout=1000 * PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless browser of this machine."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with sync_playwright() as playwright:
        # Without its sandbox, which root and most containers cannot have; it opens nothing but our page.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty tab; a script error or a blocked file in it fails the test."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    yield tab
    tab.close()
    assert errors == []


@contextmanager
def serving(app: FastAPI, port: int = 0) -> Iterator[int]:
    """Serve an application in a thread; gives its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def make_app(
    statuses: Sequence[dict[str, Any]], api_keys: Sequence[str] = (), counters: Sequence[CounterReader] = ()
) -> FastAPI:
    """Our routes over an engine whose answers are given."""
    app = FastAPI()
    FlashMemoryEndpoints().attach_router(app)
    app.state.flashmemory_api_keys = tuple(api_keys)
    app.state.flashmemory_status = StatusReader(StatusEngine(statuses), counters=counters)
    return app


def read_strip(page: Page, request_id: str) -> list[str]:
    """The state of each block of a request, from what is drawn."""
    strip = page.locator(f'[data-request="{request_id}"] .strip')
    per_row = int(strip.get_attribute("width") or 0) // PITCH
    states: dict[int, str] = {}
    for path in strip.locator("path").all():
        for left, top, width in RECTANGLE.findall(path.get_attribute("d") or ""):
            first = int(float(top)) // ROW_HEIGHT * per_row + int(left) // PITCH
            for position in range(first, first + int(width) // PITCH):
                assert position not in states, "two states are drawn for one block"
                states[position] = path.get_attribute("data-state") or ""
    return [states[position] for position in range(len(states))]


def expand(strip: Sequence[Any]) -> list[str]:
    """The state of each block."""
    return [state for state, count in strip for _ in range(count)]


@contextmanager
def decoding(server: Server, num_tokens: int) -> Iterator[str]:
    """A prompt of this length is answered until this is left; gives the id of the completion, with its first token."""
    (question,) = make_questions("late", num_tokens, 1, seed=num_tokens)
    body = {"model": MODEL_NAME, "prompt": [BOS, *encode(question.prompt)], "max_tokens": MANY_TOKENS}
    body |= {"ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as response:
        response.raise_for_status()
        # Forgetting it would close the connection.
        events = response.iter_lines()
        yield json.loads(next(events).removeprefix("data: "))["id"]


def read_at_one_step(server: Server, completion_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The status, and a request with a chosen set as its own route tells it at the same step."""
    url, end = f"{server.url}/flashmemory", time.monotonic() + PATIENCE_SECONDS
    # One client: a new one for each question takes longer, on a busy machine, than an answer stays fresh.
    with httpx.Client(base_url=url, timeout=PATIENCE_SECONDS) as client, ThreadPoolExecutor() as pool:
        while time.monotonic() < end:
            # Who asks at once gets one answer; it can be a little older than the request.
            answers = list(pool.map(client.get, ["/status?strips=16", f"/requests/{completion_id}"]))
            if all(answer.is_success for answer in answers):
                status, told = (answer.json() for answer in answers)
                if told["step"] == status["step"] and told["selection_step"] is not None:
                    return status, told
    raise AssertionError("no two answers were of the same step")


def test_the_strip_of_a_decoding_request_is_what_its_route_tells(server: Server, page: Page) -> None:
    page.goto(f"{server.url}/flashmemory")
    expect(page.get_by_text("No request runs.")).to_be_visible()
    # The first alone has more blocks than there are slots. Both go on until they were seen, however long it takes.
    with decoding(server, 8192) as completion_id, decoding(server, 3000):
        status, told = read_at_one_step(server, completion_id)
        in_page = page.locator(f'[data-request="{told["engine_request_id"]}"]')
        expect(in_page).to_be_visible()
        # It goes on by itself.
        expect(in_page).not_to_have_attribute("data-step", in_page.get_attribute("data-step") or "")
    page.route(re.compile(r"/flashmemory/status\?"), lambda route: route.fulfill(json=status))
    expect(in_page).to_have_attribute("data-step", str(told["step"]))
    drawn = read_strip(page, told["engine_request_id"])
    page.unroute_all()
    assert drawn == expand(told["strips"][0])
    assert len(drawn) == told["num_blocks"] > 256
    assert {"sink", "recent", "resident", "evicted"} <= set(drawn)
    expect(page.get_by_text("No request runs.")).to_be_visible()
    assert told["request_id"].removesuffix("-0") == completion_id
    # What it chose stays when it has ended.
    expect(page.get_by_role("cell", name=told["request_id"]).first).to_be_visible()


def test_it_asks_for_the_api_key_and_sends_it(page: Page) -> None:
    app = make_app([make_status(make_request("cmpl-a-0"))], api_keys=["secret"])
    with serving(app) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        field = page.get_by_label("This server has an API key")
        expect(field).to_be_focused()
        expect(page.get_by_role("heading", name="Memory", exact=True)).to_be_hidden()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("this key is not right")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("live")
        expect(page.get_by_role("heading", name="cmpl-a-0")).to_be_visible()
        page.reload()
        expect(page.get_by_role("status")).to_have_text("live")


def test_a_server_that_goes_away_is_told_and_found_again(page: Page) -> None:
    with serving(make_app([make_status(make_request("cmpl-a-0"))])) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("status")).to_have_text("live")
    expect(page.get_by_role("status")).to_contain_text("server does not answer")
    expect(page.get_by_role("heading", name="cmpl-a-0")).to_be_visible()
    with serving(make_app([make_status(step=99)]), port):
        expect(page.get_by_role("status")).to_have_text("live")
        expect(page.get_by_text("No request runs.")).to_be_visible()
        expect(page.get_by_text("step 99")).to_be_visible()


def test_an_answer_that_cannot_be_drawn_is_not_called_none(page: Page) -> None:
    told = make_status(make_request("cmpl-a-0"))
    broken = {name: value for name, value in told.items() if name != "memory"}
    with serving(make_app([told])) as port:
        page.route(re.compile(r"/flashmemory/status\?"), lambda route: route.fulfill(json=broken))
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("status")).to_contain_text("the answer cannot be shown")
        page.unroute_all()
        expect(page.get_by_role("heading", name="cmpl-a-0")).to_be_visible()


def test_another_backend_is_told(page: Page) -> None:
    app = make_app([])
    app.state.flashmemory_status = None
    with serving(app) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("status")).to_contain_text("does not run --attention-backend flashmemory")


def test_a_request_id_is_text_whatever_it_holds(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    with serving(make_app([make_status(make_request(hostile))])) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("heading", name=hostile)).to_be_visible()
        assert page.locator("img").count() == 0


def test_every_layer_group_has_a_strip_and_a_late_selection_is_marked(page: Page) -> None:
    request = make_request("cmpl-a-0", strips=[STRIP, STRIP[::-1]])
    with serving(make_app([make_status(request)])) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("img", name=re.compile("layer group"))).to_have_count(2)
        expect(page.get_by_role("cell", name="late")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_with_a_very_long_request(
    page: Page, scheme: Any, contrast_of: Callable[[str], float]
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 320, "height": 700})
    strip = [["sink", 4], *([["evicted", 30], ["resident", 2]] * 1024), ["recent", 8]]
    with serving(make_app([make_status(make_request("cmpl-" + "long" * 30, strips=[strip]))])) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.get_by_role("img", name=re.compile("30,720 evicted"))).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 320
        for selector in ("h1", "#facts", "#connection", ".note", ".counts", "th"):
            assert contrast_of(selector) >= 4.5, selector


@pytest.fixture
def contrast_of(page: Page) -> Callable[[str], float]:
    """Contrast of a text against the page by WCAG 2: 21 for black on white."""

    def luminance(selector: str, name: str) -> float:
        color = page.locator(selector).first.evaluate("(one, name) => getComputedStyle(one)[name]", name)
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(selector: str) -> float:
        dark, light = sorted((luminance(selector, "color"), luminance("body", "backgroundColor")))
        return (light + 0.05) / (dark + 0.05)

    return contrast


def test_windows_and_states_have_a_bar_where_there_are_any(page: Page, tmp_path: Path) -> None:
    with serving(make_app([make_status()])) as port:
        page.goto(f"http://127.0.0.1:{port}/flashmemory")
        expect(page.locator(".gauge")).to_have_count(2)
    with CounterWriter.create(tmp_path, worker_name(0)), CounterWriter.create(tmp_path, SCHEDULER) as scheduler:
        scheduler.set("native_blocks_total", 9)
        scheduler.set("native_blocks_used", 4)
        with serving(make_app([make_status()], counters=[CounterReader(tmp_path)])) as port:
            page.goto(f"http://127.0.0.1:{port}/flashmemory")
            expect(page.locator(".gauge")).to_have_count(3)
            expect(page.locator(".gauge").last).to_contain_text("Windows and states")
            expect(page.locator(".gauge").last).to_contain_text("4 of 9 (44.4 %)")
