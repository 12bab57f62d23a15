"""The page in a real browser, against a stand-in server: no model is needed for what it shows."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.serve.standin import ANSWER, PROMPT, THOUGHT, StandIn, running
from tests.support import browser as browsers
from v4jax.serve.page import FOLDER, page_routes

ROOT = Path(__file__).resolve().parents[2]
TOOL = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
NARROW = {"viewport": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def chromium():
    with browsers.browser() as found:
        yield found


@pytest.fixture(scope="module")
def server():
    stand_in = StandIn()
    with running(stand_in.app) as address:
        stand_in.address = address
        yield stand_in


@pytest.fixture
def page(chromium, server):
    with browsers.clean_page(chromium, server.address) as found:
        yield found


def send(page, text="What is 40 + 2?"):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer[aria-busy=false]:last-child")


def text_of(page, selector):
    return page.locator(selector).last.evaluate("node => node.textContent")


def test_a_message_is_sent_and_its_answer_streamed(page, server):
    page.uncheck("#thinking")
    send(page)
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "What is 40 + 2?"}]
    assert server.bodies[-1]["stream"] and server.bodies[-1]["model"] == "nano"
    assert text_of(page, ".answer > .text") == ANSWER
    # Text of a model is text: none of it became an element.
    assert page.locator(".messages b, .messages script").count() == 0
    assert "256 from the prefix cache" in text_of(page, ".status")
    assert "of them drafted" in text_of(page, ".status")
    assert page.locator(".answer .token.draft").count() > 0
    # The next turn has the whole conversation.
    send(page, "<i>again</i>")
    assert [each["role"] for each in server.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert server.bodies[-1]["messages"][1]["content"] == ANSWER
    assert text_of(page, ".user .text") == "<i>again</i>"


def test_thinking_folds(page, server):
    page.check("#thinking")
    send(page)
    thinking = page.locator(".thinking").last
    assert text_of(page, ".thinking .text") == THOUGHT
    assert thinking.get_attribute("open") is None
    thinking.locator("summary").click()
    assert thinking.locator(".text").is_visible()
    send(page, "and now?")
    assert server.bodies[-1]["messages"][1]["reasoning_content"] == THOUGHT


def test_tool_calls_are_shown_and_their_results_sent(page, server):
    page.locator("#more summary").click()
    page.fill("#tools", TOOL)
    page.fill("#system", "Be brief.")
    send(page)
    assert text_of(page, ".call h4") == "calls add"
    assert text_of(page, ".arguments") == '{"a": 40, "b": 2}'
    page.fill(".call textarea", "42")
    page.get_by_role("button", name="Send the result").click()
    page.locator(".answer").nth(1).locator(".look").wait_for()
    sent = server.bodies[-1]["messages"]
    assert [each["role"] for each in sent] == ["system", "user", "assistant", "tool"]
    assert sent[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 40, "b": 2}'}
    assert sent[3] == {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    page.fill("#tools", "{")
    page.fill("#prompt", "again")
    page.press("#prompt", "Enter")
    assert "not valid JSON" in page.locator("#alert").inner_text()


def test_a_token_is_clicked_and_its_lens_drawn(page):
    page.uncheck("#thinking")
    send(page)
    page.locator(".answer > .text .token").nth(4).click()
    page.wait_for_selector(".layers")
    assert page.locator(".strip .token").count() == PROMPT + len(re.findall(r" |[^ ]+", ANSWER))
    assert page.locator(".strip [aria-current]").get_attribute("data-position") == str(PROMPT + 4)
    assert page.locator(".layer .context .plot").count() == 3
    assert page.locator(".layer .window .plot").count() == 5
    assert page.locator(".layer .experts .plot").count() == 5
    assert page.locator(".matrix").count() == 10
    assert "32 of 76 entries chosen" in page.locator(".layer .context small").first.inner_text()
    page.locator(".layer .window .plot").first.hover()
    assert "“" in page.locator(".layer .window small").first.inner_text()
    assert page.locator(".likely").count() == 2
    assert [each.inner_text() for each in page.locator("#legend b").all()][:2] == ["256", "44"]
    # The pass that wrote the token is the one before.
    page.get_by_label("the pass that wrote it").check()
    page.get_by_text(f"token {PROMPT + 3} was chosen from").wait_for()
    # Any token of the prompt too.
    page.get_by_label("the pass that read it").check()
    page.locator(".strip .token").nth(0).click()
    page.get_by_text("nothing stands before it").wait_for()


def test_everything_is_done_with_the_keyboard(page):
    page.uncheck("#thinking")
    page.focus("#prompt")
    page.keyboard.type("What is 40 + 2?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[aria-busy=false]")
    assert focused(page) == "prompt"
    for _ in range(40):  # back to the answer's tokens
        page.keyboard.press("Shift+Tab")
        if "token" in page.evaluate("document.activeElement.className"):
            break
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.place") == "2"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is seen
    page.keyboard.press("Enter")
    page.wait_for_selector(".layers")
    # On into the strip, where arrows move and Enter looks.
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#strip') !== null"):
            break
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.get_by_text(f"token {PROMPT + 1} was chosen from").wait_for()


def focused(page):
    return page.evaluate("document.activeElement.id")


def test_tab_goes_through_the_page_in_the_order_that_is_seen(page):
    order = []
    for _ in range(24):  # around once, and on
        page.keyboard.press("Tab")
        order.append(focused(page) or page.evaluate("document.activeElement.textContent"))
    start = order.index("To the message field")
    names = ["theme", "prompt", "send", "thinking", "temperature", "max-tokens", "clear"]
    assert order[start + 1 : start + 8] == names


def test_escape_stops_the_answer_and_not_the_page(chromium):
    slow = StandIn(pause=0.2)
    with running(slow.app) as address, browsers.clean_page(chromium, address) as page:
        page.fill("#prompt", "a long answer")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer .token")
        assert page.locator("#stop").is_visible()
        page.keyboard.press("Escape")
        page.get_by_text("stopped").wait_for()
        assert slow.left.wait(5)
        assert page.locator("#send").is_visible() and focused(page) == "prompt"
        assert 0 < len(text_of(page, ".answer > .text")) < len(ANSWER)


def test_a_narrow_screen(chromium, server):
    with browsers.clean_page(chromium, server.address, **NARROW) as page:
        page.uncheck("#thinking")
        send(page)
        page.locator(".look").click()
        page.wait_for_selector(".layers")
        widest = page.evaluate("document.documentElement.scrollWidth")
        assert widest <= 390
        chat, lens = (page.locator(name).bounding_box() for name in ("#chat", "#lens"))
        assert lens["y"] >= chat["y"] + chat["height"]
        assert page.locator(".layer .context .plot").first.bounding_box()["width"] > 300


def test_light_and_dark(chromium, server):
    def ground(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with browsers.clean_page(chromium, server.address, color_scheme="dark") as page:
        dark = ground(page)
        page.click("#theme")
        light = ground(page)
        assert "light" in page.locator("#theme").inner_text() and light != dark
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert ground(page) == light
        page.click("#theme")
        assert ground(page) == dark
    with browsers.clean_page(chromium, server.address, color_scheme="light") as page:
        assert ground(page) == light


def test_load_is_shown(page):
    page.wait_for_selector("#load dd")
    cells = page.locator("#load > div").all_inner_texts()
    assert cells[0].split() == ["running", "3"] and cells[1].split() == ["waiting", "1"]
    assert cells[3].split() == ["first", "token", "150", "ms"]
    assert cells[4].split()[:2] == ["between", "tokens"]


def test_a_key_is_asked_for_and_kept_for_the_session(chromium):
    app = StandIn(key="secret").app
    with running(app) as address, browsers.clean_page(chromium, address) as page:
        page.expected = ("401",)  # the browser says so itself
        page.fill("#prompt", "hello")
        page.press("#prompt", "Enter")
        page.get_by_text("the API key is missing or unknown").wait_for()
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        send(page)
        assert text_of(page, ".answer > .text") == ANSWER
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert page.input_value("#key") == "secret"
        assert page.evaluate("Object.keys(localStorage)") == []


def test_without_chat_tokens_and_without_the_lens(chromium):
    stand_in = StandIn(chat=False, lens=False)
    with running(stand_in.app) as address, browsers.clean_page(chromium, address) as page:
        assert "no chat tokens" in page.locator("#prompt-label").inner_text()
        assert "--lens" in page.locator("#lens-note").inner_text()
        page.fill("#prompt", "def f(")
        page.press("#prompt", "Enter")
        page.wait_for_selector(".answer[aria-busy=false]")
        assert stand_in.bodies[-1]["prompt"] == "def f("
        assert text_of(page, ".answer > .text") == ANSWER
        assert page.locator(".look, .answer [role=button]").count() == 0


def test_events_are_read_however_the_network_cuts_them(page):
    found = page.evaluate(
        """async () => {
          const { events } = await import("/page/sse.js");
          const text = ": hello\\r\\n\\r\\ndata: {\\"a\\": \\"é🙂\\"}\\r\\n\\r\\n"
            + "event: v4jax\\ndata:1\\ndata: 2\\n\\nid: 7\\rdata: x\\r\\rdata: [DONE]\\n\\n";
          const bytes = new TextEncoder().encode(text);
          const all = [];
          for (const size of [1, 2, 3, 7, 1000]) {
            const body = new ReadableStream({ start(out) {
              for (let i = 0; i < bytes.length; i += size) out.enqueue(bytes.slice(i, i + size));
              out.close();
            } });
            const these = [];
            for await (const each of events(body)) these.push([each.event, each.data]);
            all.push(JSON.stringify(these));
          }
          return all;
        }"""
    )
    expected = [["message", '{"a": "é🙂"}'], ["v4jax", "1\n2"], ["message", "x"]]
    for each in found:
        assert json.loads(each) == [*expected, ["message", "[DONE]"]]


def test_the_policy_stops_a_script_that_was_smuggled_in(chromium, server):
    with browsers.clean_page(chromium, server.address) as page:
        page.expected = ("Content Security Policy", "inline")
        ran = page.evaluate(
            """() => {
              const script = document.createElement("script");
              script.textContent = "window.ran = 1";
              document.body.append(script);
              const image = document.createElement("img");
              image.setAttribute("onerror", "window.ran = 2");
              image.src = "/page/nothing.png";
              document.body.append(image);
              return window.ran;
            }"""
        )
        assert ran is None
        page.expected = (*page.expected, "404")


# Without a browser.


@pytest.fixture(scope="module")
def client():
    from starlette.applications import Starlette

    return TestClient(Starlette(routes=page_routes({"model": "nano"})))


def test_every_file_is_served_under_the_policy(client):
    for path in ["/", *(f"/page/{each.name}" for each in FOLDER.iterdir())]:
        response = client.get(path)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/server.json").json() == {"model": "nano"}


@pytest.mark.parametrize(
    "path", ["/page/../page.py", "/page/..%2fpage.py", "/page/%2e%2e/lens.py", "/page/page.py"]
)
def test_no_other_file_is_served(client, path):
    assert client.get(path).status_code == 404


def test_an_installed_package_has_every_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = project["package-data"]["v4jax"]
    for each in FOLDER.iterdir():
        name = each.relative_to(ROOT / "v4jax")
        assert any(name.match(pattern) for pattern in patterns), name


def test_no_file_names_another_host_or_makes_markup_of_text():
    for path in FOLDER.iterdir():
        source = path.read_text()
        hosts = set(re.findall(r"https?://([\w.]+)", source)) - {"www.w3.org"}
        assert not hosts, path.name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "document.write"):
            assert word not in source, path.name
        if path.suffix == ".html":
            assert (
                "<style" not in source
                and " style=" not in source
                and " on" not in re.sub(r">[^<]*<", "><", source)
            )
            assert not re.search(r"<script(?![^>]* src=)", source)
