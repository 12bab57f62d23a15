"""Headless Chromium, driven by Playwright; a page that forgets no error and no request."""

import contextlib
import os
import shutil
from urllib.parse import urlparse

import pytest

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def executable() -> str:
    """The browser's path; skips the test where there is none."""
    pytest.importorskip("playwright", reason="needs the extra browser-test")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if found is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    return found


@contextlib.contextmanager
def browser():
    """A browser with an empty profile of its own."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield chromium
        finally:
            chromium.close()


@contextlib.contextmanager
def clean_page(chromium, address, **options):
    """A page at an address; afterwards nothing was in its console and no other host was asked."""
    context = chromium.new_context(**({"viewport": {"width": 1440, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(10_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    context.on("request", lambda request: asked.append(request.url))
    page.said, page.asked = said, asked
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    try:
        yield page
        expected = getattr(page, "expected", ())
        assert [each for each in said if not any(word in each for word in expected)] == []
        assert {urlparse(url).netloc for url in asked} == {urlparse(address).netloc}
    finally:
        context.close()
