"""The page of a service that asks for keys: it asks the person, keeps the key for the tab, and shows what the key may see."""

from __future__ import annotations

from playwright.async_api import Browser, expect

from query_service.api_keys import new_key
from schemas.access import Grant, Scope, place_from_text
from tests.browser.test_page import SECONDS, browser
from tests.query_http import running
from tests.query_world import QueryWorld

__all__ = ["browser"]


async def test_the_page_asks_for_a_key_and_works_with_it(browser: Browser) -> None:
    world = await QueryWorld().start()
    await world.put("mine/a.jpg", 10)
    await world.put("theirs/b.jpg", 11)
    made = new_key("page", Grant.of([Scope.READ, Scope.SEARCH], [place_from_text("images/mine/")]))
    await world.metadata.add_api_key(made.stored)
    async with running(world, api_keys="required") as client:
        page = await browser.new_page()
        page.set_default_timeout(15 * SECONDS)
        refused: list[str] = []
        page.on("console", lambda message: refused.append(message.text) if "Content Security" in message.text else None)
        await page.goto(str(client.make_url("/")))
        await expect(page.locator("#key-form")).to_be_visible()
        await page.get_by_label("API key").fill(made.text)
        await page.get_by_label("API key").press("Enter")
        await expect(page.locator("#hits .key")).to_have_text(["mine/a.jpg"])
        await expect(page.locator("#key-form")).to_be_hidden()
        await expect(page.locator("#status-text")).to_contain_text("1 picture")
        await expect(page.locator("#feed .key")).to_have_count(0)
        # Again and again: an event from before the stream was open is not for it.
        for generation in range(1, 100):
            await world.publish("theirs/b.jpg", generation)
            await world.publish("mine/a.jpg", generation)
            if await page.locator("#feed .key").count():
                break
            await page.wait_for_timeout(200)
        assert set(await page.locator("#feed .key").all_text_contents()) == {"mine/a.jpg"}
        assert made.text not in page.url
        assert refused == []
        await page.close()
