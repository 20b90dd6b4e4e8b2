"""The playground: its route and headers, and the page in Chromium, over a real server."""

import re
import time
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")
import httpx
from browsing import browser, page  # noqa: F401
from running import relay, running

from specdiff import SpeculativeLM
from specdiff.engine import Request
from specdiff.serve.app import build
from specdiff.serve.live import Job, LiveEngine
from specdiff.types import SamplingParams
from specdiff.verify import token
from test_lm import target, tokenizer  # noqa: F401

ROOT = Path(__file__).parents[2]
STATIC = files("specdiff.serve") / "static"
ASSETS = sorted(entry.name for entry in STATIC.iterdir())
KEY = "secret"
IDLE = "#stop[aria-disabled=true]"


@pytest.fixture(scope="module")
def lm(target: Any, tokenizer: Any) -> SpeculativeLM:
    """With a drafter that is accepted at times: greedy text of random weights repeats itself."""
    return SpeculativeLM(target, "ngram", tokenizer, max_len=128)


def live(lm: SpeculativeLM, pause: float = 0.0, **options: Any) -> LiveEngine:
    """An engine whose rounds take at least `pause` seconds."""
    return LiveEngine(
        lm.target, lm.drafter, token, 3, max_len=lm.max_len,
        observe=lambda step: time.sleep(pause), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def url(lm: SpeculativeLM) -> Iterator[str]:
    with running(build(lm, live(lm, 0.01), name="tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def locked(lm: SpeculativeLM) -> Iterator[str]:
    with running(build(lm, live(lm), name="tiny", api_key=KEY)) as address:
        yield address


@pytest.mark.parametrize("path", ["/", *[f"/static/{name}" for name in ASSETS]])
def test_the_page_needs_no_key_and_its_headers_are_strict(locked: str, path: str) -> None:
    answer = httpx.get(locked + path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    etag = {"if-none-match": answer.headers["etag"]}
    assert httpx.get(locked + path, headers=etag).headers["content-security-policy"] == policy


@pytest.mark.parametrize(
    "path", ["/static/../v1/models", "/static/%2e%2e/v1/models", "/static/%2e%2e/app.py", "//"]
)
def test_nothing_else_is_served_without_a_key(locked: str, path: str) -> None:
    with httpx.Client() as client:  # sends the path as it stands
        answer = client.get(httpx.URL(locked).copy_with(raw_path=path.encode()))
    assert answer.status_code in (401, 404)


def test_the_files_are_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "serve/static/*" in project["tool"]["setuptools"]["package-data"]["specdiff"]
    assert {"index.html", "playground.css", "playground.js"} <= set(ASSETS)


def test_the_page_holds_no_inline_code_and_loads_nothing_from_elsewhere() -> None:
    for name in ASSETS:
        text = (STATIC / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", page)
    links = re.findall(r'(?:src|href)="static/([^"]+)"', page)
    assert set(links) <= set(ASSETS)


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    page.fill("#prompt", "the rain")
    page.fill("#max_tokens", "24")
    page.fill("#seed", "3")


def run(page: Any, button: str = "#run") -> None:
    page.click(button)
    page.wait_for_selector(IDLE)


def test_an_answer_streams_with_its_rounds(lm: SpeculativeLM, page: Any, url: str) -> None:
    opened(page, url)
    assert page.input_value("#draft_len") == "3"
    page.check("[value=prompt]", force=True)
    page.click("#run")
    page.wait_for_selector("#drafted .text[aria-busy=true] span")
    page.wait_for_selector(IDLE)
    want = lm.generate("the rain", raw=True, max_tokens=24, seed=3, temperature=0, draft_len=3)
    assert page.text_content("#drafted .text") == want.text
    stats = want.stats
    assert stats.accepted > 0
    assert page.inner_text("#tau") == f"{stats.tau:.2f}"
    assert page.inner_text("#alpha") == f"{100 * stats.alpha:.0f} %"
    assert page.inner_text("#status") == f"{stats.tokens} tokens in {stats.rounds} rounds, seed 3."
    shares = page.locator("#position-bars .share").all_inner_texts()
    reached = zip(stats.passed, stats.reached, strict=True)
    assert shares == [f"{100 * p / r:.0f} %" if r else "\N{EN DASH}" for p, r in reached]
    assert page.locator("#bars g").count() == stats.rounds
    assert page.complaints == []


def test_rounds_are_scrubbed_by_keyboard(page: Any, url: str) -> None:
    opened(page, url)
    run(page)
    page.focus("#scrub")
    page.keyboard.press("Home")
    assert page.get_attribute("#scrub", "aria-valuetext").startswith("Round 1 of ")
    assert page.inner_text("#round strong") == "Round 1"
    assert page.locator("#round .chip").count() >= 1
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#round strong") == "Round 2"
    assert page.locator("#bars g.current").count() == 1
    marked = page.locator("#drafted .text .current").all()
    assert {piece.get_attribute("data-round") for piece in marked} <= {"1"}


def test_the_answer_without_drafter_follows(lm: SpeculativeLM, page: Any, url: str) -> None:
    opened(page, url)
    page.check("[value=prompt]", force=True)
    run(page)
    text = page.text_content("#drafted .text")
    chunks = lm.stream("the rain", raw=True, max_tokens=24, seed=3, temperature=0, draft_len=3)
    accepted = [chunk.text for chunk in chunks if chunk.accepted]
    assert page.locator("#drafted .accepted").all_text_contents() == accepted != []
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    run(page, "#compare")
    assert [body["draft_len"] for body in bodies] == [0]
    assert page.locator("#plain .accepted").count() == 0
    assert page.text_content("#drafted .text") == text  # the first answer is not repeated
    plain = SpeculativeLM(lm.target, "none", lm.tokenizer, max_len=128)
    want = plain.generate("the rain", raw=True, max_tokens=24, seed=3, temperature=0)
    assert page.text_content("#plain .text") == want.text
    assert page.inner_text("#verdict") == "Both texts are identical."
    assert re.fullmatch(r"\d+\.\d\d\N{MULTIPLICATION SIGN}", page.inner_text("#ratio"))
    assert page.complaints == []


def test_a_conversation_goes_on_and_starts_anew(lm: SpeculativeLM, page: Any, url: str) -> None:
    opened(page, url)
    page.fill("#temperature", "1")
    page.fill("#max_tokens", "12")  # random bytes take many tokens when they are read again
    run(page)
    first = page.text_content("#drafted .text")
    page.fill("#prompt", "more <b>rain</b>")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(IDLE)
    turns = page.locator("#turns li").all_text_contents()
    assert turns == ["the rain", first, "more <b>rain</b>"]  # markup stays text
    messages = [
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "more <b>rain</b>"},
    ]
    want = lm.chat(messages, max_tokens=12, seed=3, draft_len=3)
    assert page.text_content("#drafted .text") == want.text
    page.click("#clear")
    assert page.is_hidden("#turns")


def test_a_system_message_begins_a_conversation(lm: SpeculativeLM, page: Any, url: str) -> None:
    opened(page, url)
    assert page.is_visible("#system")
    page.fill("#max_tokens", "12")
    page.fill("#system", "in spain")
    run(page)
    first = page.text_content("#drafted .text")
    system = {"role": "system", "content": "in spain"}
    messages = [system, {"role": "user", "content": "the rain"}]
    want = lm.chat(messages, max_tokens=12, seed=3, temperature=0, draft_len=3)
    assert first == want.text
    page.fill("#prompt", "more")
    run(page)  # it stays the first message, and is no turn
    assert page.locator("#turns li").all_text_contents() == ["the rain", first, "more"]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "more"}]
    want = lm.chat(messages, max_tokens=12, seed=3, temperature=0, draft_len=3)
    assert page.text_content("#drafted .text") == want.text
    page.check("[value=prompt]", force=True)
    assert page.is_hidden("#system")


def test_a_server_that_hides_its_rounds_streams_text(lm: SpeculativeLM, page: Any) -> None:
    with running(build(lm, live(lm), name="tiny", stream_chunk=4)) as url:
        opened(page, url)
        page.check("[value=prompt]", force=True)
        run(page)
        want = lm.generate("the rain", raw=True, max_tokens=24, seed=3, temperature=0, draft_len=3)
        assert page.text_content("#drafted .text") == want.text
        assert "hides its rounds" in page.inner_text("#status")
        assert page.is_hidden("#timeline") and page.is_hidden("#compare")


def test_stop_leaves_the_text_so_far(lm: SpeculativeLM, page: Any) -> None:
    engine = live(lm, 0.2)
    with running(build(lm, engine, name="tiny")) as url:
        opened(page, url)
        page.fill("#max_tokens", "80")
        page.click("#run")
        page.wait_for_selector("#drafted .text span")
        page.keyboard.press("Escape")
        page.wait_for_selector(IDLE)
        assert page.inner_text("#status") == "Stopped."
        assert page.text_content("#drafted .text")
        deadline = time.monotonic() + 20
        while engine.running:
            assert time.monotonic() < deadline, "the server goes on"
            time.sleep(0.05)


@pytest.mark.parametrize(
    "field, value", [("temperature", "-1"), ("top_p", "2"), ("max_tokens", "0")]
)
def test_a_refused_field_is_marked(page: Any, url: str, field: str, value: str) -> None:
    opened(page, url)
    page.check("[value=prompt]", force=True)
    run(page)
    page.fill(f"#{field}", value)
    run(page)
    assert page.is_visible("#error[role=alert]")
    assert field in page.inner_text("#error")
    assert page.get_attribute(f"#{field}", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == field
    assert page.inner_text("#tau") == "\N{EN DASH}"  # not the last answer's
    page.fill(f"#{field}", "1")
    run(page)
    assert page.is_hidden("#error")


def test_a_key_is_requested_and_held_for_the_session(page: Any, locked: str) -> None:
    page.goto(locked)
    page.wait_for_selector("#key", state="visible")
    assert "API key" in page.inner_text("#error")
    page.fill("#key", KEY)
    page.fill("#prompt", "the rain")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#drafted .text span")
    page.wait_for_selector(IDLE)
    assert page.is_hidden("#error")
    page.reload()
    page.wait_for_selector("#model:not(:empty)")
    assert page.evaluate("localStorage.length") == 0


def test_a_full_server_says_when_to_try_again(lm: SpeculativeLM, page: Any) -> None:
    engine = live(lm, 0.2, max_rows=1, max_queue=1)
    with running(build(lm, engine, name="tiny")) as url:
        opened(page, url)
        long = Request([1, 2], SamplingParams(max_tokens=100), 0)
        jobs = [Job(long, lambda output: None) for _ in range(2)]
        engine.submit(*jobs)
        run(page)
        assert "Try again in 1 s." in page.inner_text("#error")
        for job in jobs:
            engine.cancel(job)


def test_a_failure_within_a_stream_is_shown(lm: SpeculativeLM, page: Any) -> None:
    steps: list[Any] = []

    def crash(step: Any) -> None:
        steps.append(step)
        if len(steps) > 4:
            raise RuntimeError("out of memory")

    engine = LiveEngine(lm.target, lm.drafter, token, 3, max_len=lm.max_len, observe=crash)
    with running(build(lm, engine, name="tiny")) as url:
        opened(page, url)
        run(page)
        assert "out of memory" in page.inner_text("#error")
        assert page.text_content("#drafted .text")
        assert page.get_attribute("#drafted .text", "aria-busy") == "false"


def test_a_lost_server_is_reported(lm: SpeculativeLM, page: Any) -> None:
    with running(build(lm, live(lm), name="tiny")) as url:
        opened(page, url)
    run(page)
    assert page.inner_text("#error") == "The server cannot be reached."


def test_a_connection_lost_within_a_stream_is_reported(lm: SpeculativeLM, page: Any) -> None:
    with running(build(lm, live(lm, 0.2), name="tiny")) as url, relay(url) as (address, cut):
        opened(page, address)
        page.fill("#max_tokens", "80")
        page.click("#run")
        page.wait_for_selector("#drafted .text span")
        cut()
        page.wait_for_selector(IDLE)
        assert page.inner_text("#error") == "The connection was lost."
        assert page.text_content("#drafted .text")


@pytest.mark.parametrize("width", [320, 380, 800, 1280])
def test_nothing_is_wider_than_the_window(page: Any, url: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    opened(page, url)
    page.fill("#prompt", "rain" * 60)
    page.fill("#max_tokens", "8")
    run(page)
    run(page, "#compare")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_has_a_name_and_is_reached_by_keyboard(page: Any, url: str) -> None:
    opened(page, url)
    run(page)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, select")]
            .filter((one) => one.checkVisibility())
            .filter((one) => !(one.labels?.length || one.ariaLabel || one.textContent.trim()))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    page.focus("body")
    reached = set()
    for _ in range(26):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    wanted = {"theme", "system", "prompt", "draft_len", "temperature", "top_p", "max_tokens",
              "seed", "run", "stop", "compare", "clear", "scrub"}  # fmt: skip
    assert wanted <= reached


def test_the_theme_follows_the_system_until_it_is_set(page: Any, url: str) -> None:
    def paper() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="light")
    opened(page, url)
    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert dark != light
    page.click("#theme")
    assert paper() == light
    page.reload()
    assert paper() == light
