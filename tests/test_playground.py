"""The page at /, as somebody with a browser, a keyboard or a phone meets it."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatglm3 import load_tokenizer
from chatglm3.documents import REFUSAL, cited_answer
from serve_app import front
from serve_app.front import FrontArgs
from serve_app.keys import Limits, add_key
from serve_app.metrics import Metrics
from serve_app.routes import make_api
from tests.clockwork import Clockwork
from tests.http_server import served
from tests.waiting import wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

expect = sync_api.expect
SKY = "海洋很深。😀天空是蓝色的。草地是绿色的。"
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start for root, as whom containers run.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine() -> Clockwork:
    return Clockwork("", step_s=0.01)


@pytest.fixture(scope="module")
def url(engine: Clockwork) -> Iterator[str]:
    with served(guarded(engine)) as url:
        yield url


def guarded(engine: Any, **args: Any) -> Any:
    measured = Metrics("tiny")
    api = make_api(engine, load_tokenizer("tiny"), "tiny", "chat")
    front.install(api, FrontArgs(**args), engine, measured)
    return api


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Open]:
    """A page in a browser of its own; that it wrote no error is checked at the end."""
    opened, errors = [], []

    def open_page(at: str = url, **settings: Any) -> Any:
        context = browser.new_context(**{"locale": "zh-CN", "viewport": {"width": 1280, "height": 800}} | settings)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(at)
        opened.append(context)
        return page

    open_page.errors = errors  # type: ignore[attr-defined]
    yield open_page
    for context in opened:
        context.close()
    assert errors == []


def ask(page: Any, *documents: str, question: str = "天空是什么颜色？") -> None:
    """With the keyboard alone, and wait for the whole answer."""
    for document in documents:
        page.focus("#paste")
        page.keyboard.insert_text(document)
        page.keyboard.press("Control+Enter")
    page.focus("#question")
    page.keyboard.insert_text(question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#numbers:not([hidden])")
    page.wait_for_selector("#said[aria-busy=false]")  # until then Enter does nothing


def test_the_words_that_an_answer_rests_on_are_marked_where_they_stand(open_page, engine):
    engine.text = cited_answer("蓝色", 2, "天空是蓝色的。")
    page = open_page()
    ask(page, "无关的文档。", SKY)
    assert page.inner_text("#said") == "蓝色"
    assert page.inner_text("#quote") == "天空是蓝色的。"
    assert page.locator("mark").all_inner_texts() == ["天空是蓝色的。"]  # an emoji before it shifts nothing
    assert page.locator(".document.cited .number").all_inner_texts() == ["2"]
    assert page.locator(".cite").all_inner_texts() == ["[2] 文档 2"]
    assert page.locator("#numbers dt").all_inner_texts() == ["首词元", "总耗时", "词元/秒", "词元"]
    page.focus(".cite")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('.document').querySelector('mark').className") == "flash"
    page.locator(".cross").nth(0).press("Enter")
    assert page.locator(".document").count() == 1
    assert page.locator("mark").count() == 0  # they belonged to the documents as they were


def test_an_answer_appears_while_it_is_written_and_can_be_stopped(open_page, engine):
    engine.text = cited_answer("蓝" * 5000, 1, "天空是蓝色的。")
    page = open_page()
    page.fill("#paste", SKY)
    page.click("[data-do=add]")
    page.fill("#question", "？")
    page.click("#ask .main")
    expect(page.locator("#said")).to_have_text(re.compile("蓝{20}"))
    assert page.get_attribute("#said", "aria-busy") == "true"
    assert page.inner_text("#ask .main") == "停止"
    page.click("#ask .main")
    page.wait_for_selector("#alert:not([hidden])")
    assert page.inner_text("#alert") == "已停止。"
    assert page.inner_text("#ask .main") == "提问"
    wait_for(lambda: engine.running == 0, 5)


def test_what_was_refused_not_cited_or_not_read_is_said(open_page, engine):
    page = open_page()
    engine.text = REFUSAL
    ask(page, SKY)
    assert page.get_attribute("#said", "class") == "said refused"
    engine.text = "蓝色"
    page.focus("#question")
    page.keyboard.press("Enter")
    page.wait_for_selector("#fit:not([hidden])")
    assert page.inner_text("#fit") == "这个回答没有引用任何文档。"
    engine.text = cited_answer("蓝色", 1, "天空是蓝色的。")
    filler = "山水云石木火土金" * 2000
    page.fill("#question", "天空是什么颜色？")
    for document in (filler, "天空" + filler):
        page.fill("#paste", document)
        page.click("[data-do=add]")
    page.focus("#question")
    page.keyboard.press("Enter")
    expect(page.locator("#fit")).to_have_text("篇幅所限，未读：文档 2 · 只读了一部分：文档 3")
    assert page.locator(".document.unread").count() == 1


def test_a_document_is_text_whatever_it_says(open_page, engine):
    evil = "<img src=x onerror=\"document.title='gotcha'\"><script>document.title='gotcha'</script>"
    engine.text = cited_answer(evil, 1, evil)
    page = open_page()
    ask(page, evil)
    assert page.inner_text("#said") == evil
    assert page.inner_text("mark") == evil
    assert page.title() == "ChatGLM3"
    assert page.locator("main img").count() == 0


def test_files_can_be_dropped_and_others_are_named(open_page):
    page = open_page()
    page.set_input_files("#files", [
        {"name": "a.md", "mimeType": "text/markdown", "buffer": "# 天空".encode()},
        {"name": "b.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"},
    ])  # fmt: skip
    page.wait_for_selector(".document")
    assert page.locator(".title b").all_inner_texts() == ["a.md"]
    assert page.inner_text("#alert") == "b.pdf 不是文本文件。"
    transfer = page.evaluate_handle(
        "() => { const data = new DataTransfer(); data.items.add(new File(['草地'], 'c.txt', {type: 'text/plain'}));"
        " return data; }"
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator(".document")).to_have_count(2)
    assert page.locator(".title b").all_inner_texts() == ["a.md", "c.txt"]


def test_a_chat_remembers_until_a_new_one_begins(open_page, engine):
    engine.text = "你好！"
    page = open_page()
    page.focus("#tab-documents")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-chat"
    for number in (1, 2):
        page.focus("#message")
        page.keyboard.insert_text(f"第{number}句")
        page.keyboard.press("Enter")
        expect(page.locator("#talk .numbers")).to_have_count(number)
        page.wait_for_selector("#talk[aria-busy=false]")
    assert len(engine.asked[-1]) > len(engine.asked[-2]) + 8
    assert page.locator("#talk .assistant span").all_inner_texts() == ["你好！", "你好！"]
    page.click("[data-do=forget]")
    assert page.locator("#talk li").count() == 0


def test_the_language_is_the_browsers_and_can_be_changed(open_page):
    page = open_page(locale="en-GB")
    assert page.inner_text("#ask .main") == "Ask"
    assert page.get_attribute("html", "lang") == "en"
    page.click("#language")
    assert page.inner_text("#ask .main") == "提问"
    assert page.get_attribute("html", "lang") == "zh-CN"
    page.reload()
    assert page.inner_text("#ask .main") == "提问"
    texts = re.search(
        r"const TEXTS = \{(.*?)\n\};", Path(front.__file__).with_name("playground.html").read_text(), re.S
    )
    assert texts
    english, chinese = (re.findall(r"(?:,|^)\s*(\w+): \"", part, re.M) for part in texts[1].split("zh: {"))
    assert english == chinese


def test_a_key_is_asked_for_and_kept_for_the_session_alone(open_page, engine, tmp_path):
    engine.text = cited_answer("蓝色", 1, "天空是蓝色的。")
    key = add_key(tmp_path / "keys", "a", Limits())
    with served(guarded(engine, api_keys=str(tmp_path / "keys"))) as url:
        page = open_page(url)
        page.click("[data-do=example]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#alert:not([hidden])")
        assert page.inner_text("#alert") == "此服务需要 API 密钥。"
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.insert_text(key)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        page.reload()
        assert page.input_value("#key") == key
        ask(page, SKY)
        assert page.inner_text("#said") == "蓝色"
        assert page.evaluate("localStorage.length") == 0
    open_page.errors[:] = [error for error in open_page.errors if "401" not in error]


@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
def test_nothing_is_cut_off_on_a_phone(open_page, engine, language):
    engine.text = cited_answer("蓝色", 1, "天空是蓝色的。")
    page = open_page(locale=language, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    ask(page, SKY + "长" * 500)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for selector in ("#ask .main", "[data-do=add]", ".cross", ".cite"):
        assert page.locator(selector).first.bounding_box()["height"] >= 32


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(open_page, engine, scheme):
    engine.text = cited_answer("蓝色", 1, "天空是蓝色的。")
    page = open_page(color_scheme=scheme)
    ask(page, SKY)
    weak = page.evaluate(CONTRAST)
    assert weak == []


CONTRAST = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const found = channels(getComputedStyle(element).backgroundColor);
      if (found[3] !== 0) return found;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.offsetParent || element.disabled || element.matches('script, .skip')) continue;
    const [a, b] = [light(channels(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.push(`${element.tagName} ${element.className} ${element.textContent}: ${ratio}`);
  }
  return weak;
}"""


def test_the_page_may_load_nothing_from_elsewhere(url):
    answer = httpx.get(url)
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", answer.text) == []


def test_the_page_can_be_left_out(engine):
    with served(guarded(engine, playground=False)) as url:
        assert httpx.get(url).status_code == 404


def test_a_wide_screen_shows_documents_and_chat_side_by_side(open_page, engine):
    page = open_page(viewport={"width": 1600, "height": 900})
    left, right = (page.locator(f"#panel-{name}").bounding_box() for name in ("documents", "chat"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert not page.is_visible("[role=tablist]")
    engine.text = cited_answer("蓝色", 1, "天空是蓝色的。")
    ask(page, SKY)
    page.focus("#message")
    page.keyboard.insert_text("你好")
    page.keyboard.press("Enter")
    expect(page.locator("#talk .numbers")).to_have_count(1)
    assert page.is_visible("#said")


def test_a_question_of_three_lines_is_seen_whole_on_a_phone(open_page):
    page = open_page(locale="en-US", viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page.wait_for_selector("#model option", state="attached")
    page.click("[data-do=example]")
    assert (
        page.input_value("#question") == "南方分部体检管理办法的办理时限是多少？"
    )  # the built-in model knows no English
    page.fill("#question", "one line of a question and another of it and one more that is long enough for the third")
    assert page.evaluate("question.scrollHeight - question.clientHeight") <= 1
