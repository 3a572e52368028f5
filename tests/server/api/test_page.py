"""The pages in a real browser: what they show, cancelling, keys, keyboard, widths, no request elsewhere."""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.answer.answer import WaitingRequests
from server.api.app import make_app
from server.api.service import Service
from server.link.engine_protocol import EngineStatus
from server.link.messages import ModelInfo, Stats
from streaming.statistics import as_cells
from tests.server.api.conftest import running_app
from tests.server.api.scripted import ScriptedEngine

playwright = pytest.importorskip("playwright.sync_api", reason="the browser's driver is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; Debian's package is chromium"),
    pytest.mark.slow,
]
CHAT = "/v1/chat/completions"
STATS = {
    "hits": 70.0, "misses": 20.0, "ahead_used": 10.0, "device_bytes": 4e9, "read_s": 2.0, "stall_s": 1.0,
    "probe_bytes_per_s": 4e9, "prefix_asked_tokens": 200.0, "prefix_restored_tokens": 150.0,
    "prefix_disk_bytes": 3e9, "kv_tokens": 10.0, "kv_capacity": 40.0,
    "planned.trunk": 9e9, "used.trunk": 8e9, "planned.experts": 50e9, "used.experts": 51e9,
    "budget_bytes": 60e9,
}  # fmt: skip
# GLM-5.2's: in each layer expert 7 was asked for most, and every fourth lies in memory.
NUM_ASKED = {7: 1000, 8: 999} | {expert: expert % 30 for expert in range(9, 256)}
HEAT = {layer: (65, 35, as_cells(256, NUM_ASKED, range(layer % 4, 256, 4))) for layer in range(3, 78)}


class Visit:
    """A page in a browser, with all that it said on its console and asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def until(self, script: str) -> None:
        deadline = time.monotonic() + 30
        while not self.page.evaluate(script):  # Playwright's own waiting is what the page's policy forbids
            assert time.monotonic() < deadline, f"never: {script}"
            self.page.wait_for_timeout(50)

    def check(self, url: str) -> None:
        """No error was told, and nobody else was asked."""
        assert self.errors == []
        assert [one for one in self.asked if not one.startswith((url, "data:"))] == []
        self.context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@contextmanager
def served(service: Service, engine: Any, access: Access | None = None) -> Iterator[str]:
    with running_app(make_app(replace(service, engine=engine, line=WaitingRequests()), access)) as url:
        yield url


@contextmanager
def generating(url: str, key: str = "none", agent: str = "agent <b>7</b>") -> Iterator[list[str]]:
    """The lines of a long streamed answer, which come while the body runs."""
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, "user": agent}
    lines: list[str] = []

    def read() -> None:
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=60) as response:
            lines.extend(response.iter_lines())

    thread = threading.Thread(target=read)
    thread.start()
    yield lines
    thread.join(30)
    assert not thread.is_alive(), "the answer goes on"


@pytest.fixture
def slow_engine(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """Writes for minutes; its status has numbers of experts."""
    engine.script, engine.token_s = engine.script[:3] * 2000, 0.05
    status = EngineStatus("ready", info=ModelInfo(320, 4096), stats=Stats(STATS, HEAT))
    monkeypatch.setattr(ScriptedEngine, "status", property(lambda self: status))
    return engine


def test_a_click_on_cancel_ends_a_running_request(
    service: Service, slow_engine: ScriptedEngine, browser: Any
) -> None:
    with served(service, slow_engine) as url, generating(url) as lines:
        visit = Visit(browser, url)
        visit.until(
            "document.querySelector('#requests tr td:nth-child(2)')?.textContent.startsWith('writing')"
        )
        row = visit.page.locator("#requests tr")
        assert "agent <b>7</b>" in row.inner_text(), "what a client calls itself is text, never markup"
        row.get_by_role("button").click()
        visit.until("document.querySelectorAll('#requests tr').length === 0")
        assert visit.page.locator("#nobody").is_visible()
        visit.check(url)
    assert "cancelled" in lines[-2], "its client is told why"
    assert slow_engine.cancelled


def test_the_keyboard_alone_suffices(service: Service, slow_engine: ScriptedEngine, browser: Any) -> None:
    with served(service, slow_engine) as url, generating(url):
        visit = Visit(browser, url)
        visit.until("document.querySelector('#requests tr button')")
        for _ in range(12):
            visit.page.keyboard.press("Tab")
            if visit.page.evaluate("document.activeElement.textContent") == "Cancel":
                break
        time.sleep(2.5)  # the page has drawn its rows again meanwhile, and the focus must stay
        assert visit.page.evaluate("document.activeElement.textContent") == "Cancel"
        visit.page.keyboard.press("Enter")
        visit.until("document.querySelectorAll('#requests tr').length === 0")
        visit.check(url)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_numbers_are_shown_in_light_and_dark_on_a_phone_and_on_a_desk(
    service: Service, slow_engine: ScriptedEngine, browser: Any, scheme: Any, width: int
) -> None:
    slow_engine.script = slow_engine.script[:4]
    with served(service, slow_engine) as url:
        httpx.post(url + CHAT, json={"messages": [{"role": "user", "content": "hello"}]})
        visit = Visit(browser, url, color_scheme=scheme, viewport={"width": width, "height": 800})
        visit.until("document.querySelector('#memory').checkVisibility()")
        text = visit.page.inner_text("main")
        for shown in (
            "70.0 %",
            "75.0 %",
            "2.00 GB/s of 4.00 GB/s",
            "trunk",
            "9.00 GB, 8.00 GB",
            "60.00 GB, 59.00 GB",
            "150 of 200 tokens",
        ):
            assert shown in text, shown
        assert visit.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "nothing is cut off"
        )
        back = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, back[4:-1].split(","))) < 200) == (scheme == "dark")
        assert visit.page.locator(".bar.over").count() == 1, "what exceeds its plan stands out"
        visit.page.get_by_role("button", name="Last day").click()
        assert visit.page.get_by_role("button", name="Last day").get_attribute("aria-pressed") == "true"
        if pictures := os.environ.get("PAGE_PICTURES"):
            visit.page.screenshot(path=f"{pictures}/page-{scheme}-{width}.png", full_page=True)
        visit.check(url)


def test_the_map_has_a_cell_for_each_expert_and_is_fetched_only_where_it_is_seen(
    service: Service, slow_engine: ScriptedEngine, browser: Any
) -> None:
    def color(layer: int, expert: int) -> tuple[bool, int]:
        """Whether the cell is the colour of memory, and how strong it is."""
        drawn = f"map.getContext('2d').getImageData({expert}, {layer - 3}, 1, 1).data"
        red, _, blue, alpha = visit.page.evaluate(f"[...{drawn}]")
        return blue > red, alpha

    with served(service, slow_engine) as url:
        visit = Visit(browser, url, viewport={"width": 1280, "height": 600})
        visit.until("document.querySelector('#memory').checkVisibility()")
        assert not [one for one in visit.asked if one.endswith("experts")], "it lies below what is seen"
        visit.page.locator("h2", has_text="layer by layer").scroll_into_view_if_needed()
        visit.until("document.querySelector('#map').checkVisibility()")
        assert visit.page.evaluate("[map.width, map.height]") == [256, 75]
        assert "4,800 of 19,200" in (visit.page.locator("#map").get_attribute("aria-label") or "")
        assert color(3, 7)[0], "in memory: 3, 7, 11 and so on of layer 3"
        assert color(4, 7) == (False, 204), "as strong as a cell that is not in memory can be"
        assert color(4, 7)[1] > color(4, 20)[1] > color(4, 30)[1] == 0, "the more often, the stronger"
        visit.page.locator("#map").focus()
        for name in ["ArrowRight"] * 7 + ["ArrowDown"]:
            visit.page.keyboard.press(name)
        told = visit.page.inner_text("#cell")
        assert told.startswith("Layer 4, expert 7: on the SSD, asked for about 1,023 times."), told
        assert "65.0 % of 100 were found in memory" in told
        [size] = [len(httpx.get(one).content) for one in visit.asked if one.endswith("experts")]
        assert size < 32_000
        visit.page.evaluate("askHeat()")
        assert len([one for one in visit.asked if one.endswith("experts")]) == 1, "nothing has changed"
        visit.check(url)


def test_a_key_is_asked_for_and_shows_what_it_may_see(
    service: Service, slow_engine: ScriptedEngine, browser: Any
) -> None:
    keys = {"mine": Key("mine", "mine", "mine"), "boss": Key("boss", "boss", "boss", is_admin=True)}
    with served(service, slow_engine, Access(KeyRing.of(keys))) as url, generating(url, "mine") as _:
        for key, sees_machine in (("mine", False), ("boss", True)):
            visit = Visit(browser, url)
            visit.until("document.querySelector('dialog').open")
            visit.page.keyboard.type(key)
            visit.page.keyboard.press("Enter")
            visit.until("document.querySelectorAll('#requests tr').length === 1")
            visit.until(
                f"document.querySelector('#memory').checkVisibility() === {str(sees_machine).lower()}"
            )
            if sees_machine:
                visit.page.get_by_role("button", name="Cancel").click()
                visit.until("document.querySelectorAll('#requests tr').length === 0")
            visit.check(url)


def test_the_routes_are_listed_once_each_with_tags_and_access(
    service: Service, engine: ScriptedEngine, browser: Any
) -> None:
    with served(service, engine) as url:
        visit = Visit(browser, url + "/docs")
        visit.until("document.querySelectorAll('details').length > 20")
        summaries = visit.page.locator("summary")
        paths = summaries.evaluate_all(
            "all => all.map(one => `${one.children[0].textContent} ${one.children[1].textContent}`)"
        )
        assert len(paths) == len(set(paths))
        assert "POST /v1/chat/completions" in paths
        assert "GET /health" in paths
        assert not any(path.split()[1].startswith("/api/") for path in paths)
        assert "Bearer" in visit.page.inner_text("#access")
        assert visit.page.locator("h2", has_text="Other").count() == 0, "every route has a tag"
        visit.check(url)


@pytest.mark.slow
def test_an_idle_server_does_next_to_nothing_while_the_page_is_open(
    service: Service, engine: ScriptedEngine, browser: Any
) -> None:
    with served(service, engine) as url:
        visit = Visit(browser, url)
        visit.until("document.querySelector('#state').textContent === 'ready'")
        time.sleep(1)
        num_before, before_s, started_s = len(visit.asked), time.process_time(), time.monotonic()
        visit.page.wait_for_timeout(12_000)
        used_s, wall_s = time.process_time() - before_s, time.monotonic() - started_s
        assert len(visit.asked) - num_before <= 4, "an idle page asks every four seconds"
        assert used_s / wall_s < 0.02, "this process holds the test's own driver, too"
        visit.check(url)
