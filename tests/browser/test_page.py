"""The page in Chromium, against the real service: what a person does with it, and how it looks to a keyboard and a phone."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, FilePayload, Page, async_playwright, expect

from infra.settings import ProcessorSettings
from tests.conftest import FreshSettings, unavailable
from tests.pictures import edited_copy, jpeg
from tests.query_deployment import Service, serving

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
KEYS = [f"page/{number}.jpg" for number in range(6)]
SECONDS = 1000.0


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if chromium is None:
        unavailable("Chromium is not installed: install it, or name it in the variable CHROMIUM")
    async with async_playwright() as playwright:
        # No sandbox of its own: containers and root have none to give, and it opens nothing but our page.
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
async def service(module_settings: FreshSettings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with serving(module_settings(ProcessorSettings), tmp_path_factory.mktemp("page")) as service:
        tokens = [await service.put(key, jpeg(seed)) for seed, key in enumerate(KEYS)]
        await service.deployment.settle()
        for token in tokens:
            await service.search(jpeg(0), wait_for=token, limit="1")
        yield service


async def opened(browser: Browser, service: Service, **options: Any) -> AsyncIterator[Page]:
    context = await browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page = await context.new_page()
    page.set_default_timeout(15 * SECONDS)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    # Where a policy stops something, and where a script fails, the browser says so here.
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    await page.goto(service.url)
    yield page
    await context.close()
    assert [problem for problem in problems if "415" not in problem] == []


@pytest.fixture
async def page(browser: Browser, service: Service) -> AsyncIterator[Page]:
    async for page in opened(browser, service):
        yield page


@pytest.fixture
async def phone(browser: Browser, service: Service) -> AsyncIterator[Page]:
    async for page in opened(browser, service, viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark"):
        yield page


def file(name: str, data: bytes) -> FilePayload:
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


async def drop(page: Page, data: bytes) -> None:
    """As the browser does when a file is let go over the page."""
    carried = await page.evaluate_handle(
        """data => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return carried;
        }""",
        base64.b64encode(data).decode(),
    )
    for kind in ("dragenter", "dragover", "drop"):
        await page.dispatch_event("body", kind, {"dataTransfer": carried, "bubbles": True, "cancelable": True})


async def test_it_opens_with_what_is_in_the_bucket(page: Page) -> None:
    await expect(page.locator("#results-title")).to_have_text("In the bucket")
    await expect(page.locator(".hit")).to_have_count(len(KEYS))
    await expect(page.locator("#status-text")).to_contain_text("6 pictures")


async def test_a_chosen_picture_finds_its_original(page: Page) -> None:
    await page.set_input_files("#file", file("mine.jpg", edited_copy(jpeg(2))))
    await expect(page.locator("#results-title")).to_have_text("Results")
    first = page.locator(".hit").first
    await expect(first.locator(".key")).to_have_text("page/2.jpg")
    assert float(await first.locator(".score").inner_text()) > 60
    await expect(page.locator("#preview")).to_be_visible()
    await expect(page.locator("#drop-title")).to_have_text("mine.jpg")
    # The picture itself came, not only its frame.
    await first.locator("img").evaluate("image => image.decode()")


async def test_a_dropped_picture_finds_its_original(page: Page) -> None:
    await drop(page, edited_copy(jpeg(4)))
    await expect(page.locator(".hit .key").first).to_have_text("page/4.jpg")
    await expect(page.locator("#curtain")).to_be_hidden()


async def test_a_pasted_picture_finds_its_original(page: Page) -> None:
    await page.evaluate(
        """data => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "image.png", { type: "image/jpeg" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));
        }""",
        base64.b64encode(edited_copy(jpeg(1))).decode(),
    )
    await expect(page.locator(".hit .key").first).to_have_text("page/1.jpg")


async def test_a_hit_is_searched_on_from_and_back_leads_back(page: Page, service: Service) -> None:
    await page.locator(".hit-button", has_text="page/3.jpg").click()
    await expect(page.locator("#drop-title")).to_have_text("Like page/3.jpg")
    await expect(page.locator(".hit")).to_have_count(len(KEYS) - 1)
    await expect(page.locator(".hit", has_text="page/3.jpg")).to_have_count(0)
    assert page.url.endswith(f"#like={service.id_of('page/3.jpg')}")
    await page.reload()
    await expect(page.locator(".hit")).to_have_count(len(KEYS) - 1)
    await page.go_back()
    await expect(page.locator("#results-title")).to_have_text("In the bucket")


async def test_filters_ask_again(page: Page) -> None:
    await page.set_input_files("#file", file("mine.jpg", jpeg(2)))
    await expect(page.locator(".hit")).to_have_count(len(KEYS))
    await page.fill("#min-score", "99")
    await page.press("#min-score", "Tab")
    await expect(page.locator(".hit")).to_have_count(1)
    await page.fill("#prefix", "nothing/")
    await page.press("#prefix", "Tab")
    await expect(page.locator("#hits-empty")).to_contain_text("Nothing found")


async def test_what_is_no_picture_is_said_in_words(page: Page) -> None:
    await page.set_input_files("#file", file("notes.jpg", b"just text"))
    await expect(page.get_by_role("alert")).to_contain_text("no picture")
    await page.set_input_files("#file", file("mine.jpg", jpeg(2)))
    await expect(page.get_by_role("alert")).to_be_hidden()


async def test_pictures_arrive_live(page: Page, service: Service) -> None:
    await expect(page.locator("#feed-empty")).to_be_visible()
    # Its stream is open once the service counts a reader; before, the picture would be history.
    await page.wait_for_timeout(1500)
    await service.put("page-live/new.jpg", jpeg(100))
    arrival = page.locator(".arrival", has_text="page-live/new.jpg")
    await expect(arrival).to_be_visible()
    await expect(arrival).to_contain_text("can be found")
    await arrival.locator("img").evaluate("image => image.decode()")
    await service.put("page-live/broken.jpg", b"no picture")
    await expect(page.locator(".arrival[data-kind=failed]")).to_contain_text("page-live/broken.jpg")
    await arrival.locator("button").click()
    await expect(page.locator("#drop-title")).to_have_text("Like page-live/new.jpg")
    # Drawn before it is deleted: a picture that goes while the page fetches it is a 404 in the browser's console.
    await expect(page.locator("#preview")).to_be_visible()
    await service.search(jpeg(100), wait_for=await service.delete("page-live/new.jpg"))
    await expect(page.locator(".arrival[data-kind=deleted]")).to_contain_text("page-live/new.jpg")


async def test_by_keyboard_alone(page: Page) -> None:
    await expect(page.locator(".hit")).to_have_count(len(KEYS))
    await page.locator(".name").focus()
    seen: list[str] = []
    for _ in range(12):
        await page.keyboard.press("Tab")
        seen.append(await page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert seen[:4] == ["file", "prefix", "min-score", "limit"]
    assert {"hit-button", "open"} <= set(seen)
    await page.locator(".hit-button").first.focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#results-title")).to_have_text("Results")


async def test_nothing_is_wider_than_a_phone(phone: Page) -> None:
    await phone.set_input_files("#file", file("x" * 120 + ".jpg", jpeg(2)))
    await expect(phone.locator(".hit")).to_have_count(len(KEYS))
    assert await phone.evaluate("document.documentElement.scrollWidth") == 390


async def test_dark_is_dark(phone: Page) -> None:
    colour = await phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")) < 120


async def test_nothing_comes_from_elsewhere(browser: Browser, service: Service) -> None:
    context = await browser.new_context()
    page = await context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(service.url)
    await expect(page.locator(".hit")).to_have_count(len(KEYS))
    await context.close()
    assert asked
    assert all(url.startswith(service.url) for url in asked)


def test_the_page_has_no_inline_script_or_style() -> None:
    html = (Path(__file__).parents[2] / "query_service" / "ui" / "index.html").read_text()
    assert "style=" not in html
    assert "<style" not in html
    assert "onclick" not in html
    assert "http" not in html
