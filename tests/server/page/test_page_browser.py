"""The page in a real browser: a conversation streams, the engine is seen at work, a key is asked for, phones fit.

`INTERLACE_SCREENSHOTS=docs/images pytest tests/server/page -m slow -k screenshots` takes the pictures of the docs.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.slow

KEY = "a-key-for-the-page"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SCREENSHOTS = os.environ.get("INTERLACE_SCREENSHOTS")  # read on import: the tests' environment has no such names


@pytest.fixture(scope="module")
def served(serving):
    with serving(server={"api_keys": [KEY]}) as running:
        yield running


class Visit:
    """A tab of the page, with everything it asked the network for and complained about."""

    def __init__(self, browser, url, **options):
        self.url = url
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.requested, self.problems = [], []
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._on_console)

    def _on_console(self, message):
        if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
            self.problems.append(message.text)

    def open(self, key=KEY):
        """Go there and give the key that it asks for."""
        self.page.goto(self.url + "/")
        if key is not None:
            self.page.fill("#key", key)
            self.page.click("#key-form button")
            expect(self.page.locator("#health")).to_have_attribute("data-status", "ok", timeout=30_000)
        return self.page


@pytest.fixture
def visit(browser, served):
    """`visit(**options)` opens a tab; at the end none may have complained or asked another server."""
    visits = []

    def begin(**options):
        visits.append(Visit(browser, served.url, **options))
        return visits[-1]

    yield begin
    for one in visits:
        one.context.close()
        assert one.requested and all(url.startswith(served.url + "/") for url in one.requested), one.requested
        assert not one.problems


def ask(page, text, max_tokens=40, temperature=0):
    page.evaluate("document.getElementById('parameters').open = true")
    page.fill("#max-tokens", str(max_tokens))
    page.evaluate(f"t => {{ const r = document.getElementById('temperature'); r.value = {temperature}; }}")
    page.evaluate("document.getElementById('parameters').open = false")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def load(served, count, max_tokens):
    """`count` requests that run until they are left; returns what ends them."""

    def run(number):
        body = {"model": "smollm2", "prompt": f"{'A common beginning of many words. ' * 12}{number}", "stream": True}
        body |= {"max_tokens": max_tokens, "ignore_eos": True}
        with (
            httpx.Client(timeout=120) as client,
            client.stream("POST", f"{served.url}/v1/completions", json=body, headers=HEADERS) as stream,
        ):
            for _ in stream.iter_lines():
                if ended.is_set():
                    return

    ended = threading.Event()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()

    def end():
        ended.set()
        for thread in threads:
            thread.join()

    return end


def test_a_conversation_streams(visit):
    page = visit().open()
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const texts = document.querySelectorAll('.assistant .text');
            if (texts.length) window.seen.push(texts[texts.length - 1].textContent.length);
        }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }"""
    )
    # Long: the page draws once a frame, in which a quick engine gives several tokens.
    ask(page, "Tell a long story about a lighthouse and a storm.", max_tokens=300)
    meta = page.locator(".assistant .meta")
    expect(meta).to_contain_text("tokens", timeout=60_000)
    sizes = page.evaluate("window.seen")
    assert len(set(sizes)) > 5, "the answer did not grow bit by bit"
    assert len(page.locator(".assistant .text").inner_text()) > 20
    ask(page, "And now backwards.", max_tokens=8)
    expect(page.locator(".assistant .meta")).to_have_count(2, timeout=60_000)
    expect(page.locator(".assistant .meta").last).to_contain_text("cut off at max tokens")
    expect(page.locator(".assistant .meta").last).to_contain_text("prompt tokens cached")
    page.click("#new-chat")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_stop_ends_the_request_in_the_engine(visit, served):
    page = visit().open()
    ask(page, "Tell a very long story.", max_tokens=1500)
    expect(page.locator("#requests li")).to_have_count(1, timeout=30_000)
    page.click("#stop")
    expect(page.locator(".assistant .meta")).to_contain_text("stopped")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#requests li")).to_have_count(0, timeout=30_000)
    assert served.llm.front.num_active == 0


def test_the_live_view_moves(visit, served):
    page = visit().open()
    expect(page.locator("#idle")).to_be_visible()
    end = load(served, 3, 1200)
    try:
        expect(page.locator("#requests li")).to_have_count(3, timeout=30_000)
        expect(page.locator("#running")).to_have_text("3")
        bar = page.locator("#requests li .track i").first
        before = bar.evaluate("bar => parseFloat(bar.style.width)")
        page.wait_for_function(
            "before => parseFloat(document.querySelector('#requests li .track i').style.width) > before",
            arg=before,
            timeout=30_000,
        )
        expect(page.locator("#rate")).not_to_have_text("0", timeout=30_000)
        expect(page.locator("#itl")).to_contain_text("s")
        expect(page.locator("#ttft")).to_contain_text("s")
        for spark in ("rate", "ttft", "itl"):
            assert page.locator(f"#spark-{spark} path").count() > 1
        # The common beginning is held by all of them; the map shows it, in colours that are there.
        expect(page.locator("#legend [data-state='3'] b")).not_to_have_text("0")
        expect(page.locator("#legend [data-state='2'] b")).not_to_have_text("0")
        colours = page.evaluate(
            """() => { const c = document.getElementById('blocks');
            const data = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] === 255) seen.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
            return seen.size; }"""
        )
        assert colours >= 3
        expect(page.locator("#plugins")).to_contain_text("fcfs")
    finally:
        end()
    expect(page.locator("#requests li")).to_have_count(0, timeout=30_000)
    expect(page.locator("#legend [data-state='1'] b")).not_to_have_text("0")  # what they left in the cache


def test_the_key_is_asked_for_and_kept_in_the_tab_only(visit):
    first = visit()
    page = first.open(key=None)
    page.fill("#key", "a-wrong-key-altogether")
    page.click("#key-form button")
    expect(page.locator("#key-wrong")).to_be_visible()
    page.fill("#key", KEY)
    page.click("#key-form button")
    expect(page.locator("#health")).to_have_attribute("data-status", "ok", timeout=30_000)
    assert page.evaluate("sessionStorage.getItem('interlace-key')") == KEY
    assert page.evaluate("Object.keys(localStorage).length") == 0 and not first.context.cookies()
    page.reload()
    expect(page.locator("#health")).to_have_attribute("data-status", "ok", timeout=30_000)
    expect(page.locator("#key-dialog")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 390, 768])
def test_phones_fit_without_scrolling_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 740}, is_mobile=True, has_touch=True).open()
    ask(page, "Say averylongwordwithoutanyblank" + "x" * 200, max_tokens=8)
    expect(page.locator(".assistant .meta")).to_be_visible(timeout=60_000)
    for view in ("engine", "chat"):
        page.click(f"[data-show={view}]")
        expect(page.locator(f"main > .{view}")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_is_said_never_becomes_markup(visit):
    """Neither a model nor an id can put elements into the page."""
    page = visit().open()
    attack = "<img src=x onerror=window.hacked=1> <script>window.hacked=1</script> **<b>x</b>** `<i>y</i>`"

    def answer(route):
        chunks = [{"choices": [{"index": 0, "delta": {"content": attack}, "finish_reason": "stop"}]}]
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(status=200, content_type="text/event-stream", body=lines + "data: [DONE]\n\n")

    page.route("**/v1/chat/completions", answer)
    ask(page, attack)
    expect(page.locator(".assistant .meta")).to_be_visible()
    assert page.locator(".user .text").inner_text() == attack
    assert "<img src=x" in page.locator(".assistant .text").inner_text()
    assert page.locator(".message img, .message script, .message b, .message i").count() == 0
    assert page.evaluate("window.hacked") is None


def test_errors_are_said(visit):
    page = visit().open()
    page.evaluate("document.getElementById('prompt').value = 'word '.repeat(4000)")
    page.press("#prompt", "Enter")
    expect(page.locator(".assistant .failed")).to_contain_text("tokens", timeout=30_000)
    expect(page.locator("#send")).to_be_visible()


def test_a_limit_beyond_the_context_is_no_error(visit):
    """Clients that know nothing of the context ask for a lot; they get what fits."""
    page = visit().open()
    ask(page, "Say hi.", max_tokens=90_000)
    expect(page.locator(".assistant .meta")).to_contain_text("tokens", timeout=90_000)
    assert page.locator(".assistant .failed").count() == 0


def test_screenshots(visit, served, tmp_path):
    """What docs/ shows; written there on demand only, since every run looks a little different."""
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    phone = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    wide = {"viewport": {"width": 1360, "height": 860}, "color_scheme": "light"}
    end = load(served, 5, 700)
    try:
        for name, options in (("page", wide), ("page-dark", wide | {"color_scheme": "dark"}), ("page-phone", phone)):
            page = visit(**options).open()
            ask(page, "Write a short Python function that reverses a list, and explain it.", max_tokens=300)
            page.wait_for_function(
                "least => document.querySelector('.assistant .text')?.textContent.length > least",
                arg=250,
                timeout=90_000,
            )
            if name == "page-phone":
                page.click("[data-show=engine]")
            page.wait_for_timeout(1200)
            page.screenshot(path=folder / f"{name}.png")
            assert 10_000 < (folder / f"{name}.png").stat().st_size < 300_000
    finally:
        end()
