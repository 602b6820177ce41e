"""The report in a real browser, as a person sees it: from disk, with no network."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_space import HOSTILE, NAMES, full
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dop_fast import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
READABLE = 4.5  # WCAG 2, level AA, for text of any size
CONTRASTS = """
const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1})
  .getContext("2d", {willReadFrequently: true});
const mixed = (colours) => {
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = (rgb) => {
  const [r, g, b] = rgb.map((v) => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), owner = walker.currentNode.parentElement;
  if (!text || !owner.checkVisibility() || owner.closest("script, title")) continue;
  const style = getComputedStyle(owner), under = [];
  for (let at = owner; at; at = at.parentElement)
    under.unshift(getComputedStyle(at).backgroundColor);
  const colour = owner.closest("svg") ? style.fill : style.color;
  const back = luminance(mixed(["white", ...under])), front = luminance(mixed([colour]));
  found.push([text, (Math.max(back, front) + .05) / (Math.min(back, front) + .05)]);
}
return found;
"""


NAMELESS = """
img:not([alt]), img[alt=''], svg:not([role=img], [aria-hidden]), svg[role=img]:not([aria-label]),
th:not([scope]), th:empty, input:not([aria-label])
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Return headless Chromium with a new profile; skip where none is installed."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> str:
    return report.write(full(tmp_path_factory.mktemp("space"), tiny_images)).as_uri()


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """Return the browser with the report just opened, and logs of that alone."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)
    return browser


def look(browser: webdriver.Chrome, width: int, theme: str) -> None:
    """Show the page on a screen of this width and theme, with everything unfolded."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")


def shown(browser: webdriver.Chrome) -> list[str]:
    """Return the names of the classes whose concepts and patches can be seen."""
    items = browser.find_elements(By.CSS_SELECTOR, "[data-list] > *")
    return [str(item.get_attribute("data-name")) for item in items if item.is_displayed()]


def test_it_opens_without_an_error_and_asks_nobody_for_anything(
    page: webdriver.Chrome, address: str
) -> None:
    assert page.get_log("browser") == []
    events: list[Any] = [json.loads(row["message"]) for row in page.get_log("performance")]
    asked = [
        event["message"]["params"]["request"]["url"]
        for event in events
        if event["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in asked if not url.startswith("data:")} == {address}


def test_a_hostile_name_is_shown_and_never_run(page: webdriver.Chrome) -> None:
    assert page.title.startswith("resnet20 on tiny0")
    headings = [found.text for found in page.find_elements(By.CSS_SELECTOR, "article h3")]
    assert f"{' '.join(HOSTILE.split())} 12 segments" in headings
    assert not page.find_elements(By.CSS_SELECTOR, "img:not([src^='data:'])")
    assert HOSTILE in shown(page)


def test_the_keyboard_reaches_the_filter_and_it_shows_classes_by_name(
    page: webdriver.Chrome,
) -> None:
    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    while page.switch_to.active_element.get_attribute("id") != "filter":
        assert page.switch_to.active_element != body, "the focus went round"
        page.switch_to.active_element.send_keys(Keys.TAB)
    field = page.switch_to.active_element
    for typed, wanted in (("RED", ["red"]), ("onerror=", [HOSTILE]), ("zebra", []), ("", NAMES)):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(typed or Keys.DELETE)
        assert shown(page) == [*wanted, *wanted], typed
        assert page.find_element(By.ID, "found").text == (f"{len(wanted)} of 3" if typed else "")
        notes = page.find_elements(By.CSS_SELECTOR, "[data-list] + .missing")
        assert [note.is_displayed() for note in notes] == [not wanted] * 2


@pytest.mark.parametrize("section", ["results", "stitched", "masks", "training"])
def test_plots_are_drawn_and_labelled(page: webdriver.Chrome, section: str) -> None:
    charts = page.find_elements(By.CSS_SELECTOR, f"#{section} svg.chart")
    assert charts
    for chart in charts:
        assert chart.size["width"] > 250
        assert chart.size["height"] > 150
        assert chart.find_elements(By.CSS_SELECTOR, "path.line, rect, circle")
        left, right = chart.rect["x"], chart.rect["x"] + chart.rect["width"]
        for text in chart.find_elements(By.TAG_NAME, "text"):
            place = text.rect
            assert left - 1 <= place["x"] < place["x"] + place["width"] <= right + 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 400, 1280])
def test_nothing_is_wider_than_the_screen(page: webdriver.Chrome, width: int, theme: str) -> None:
    look(page, width, theme)
    assert page.execute_script("return innerWidth") == width
    assert page.execute_script("return document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(page: webdriver.Chrome, theme: str) -> None:
    look(page, 1280, theme)
    ratios = page.execute_script(CONTRASTS)
    assert len(ratios) > 200
    assert [(text, ratio) for text, ratio in ratios if ratio < READABLE] == []


@pytest.mark.parametrize("width", [320, 400])
def test_a_long_name_leaves_room_for_its_numbers(page: webdriver.Chrome, width: int) -> None:
    look(page, width, "light")
    shares = page.execute_script("""
      const names = [...document.querySelectorAll("table:not(.settings) th[scope=row]")];
      for (const name of names) name.textContent = "a-way-of-pruning ".repeat(9);
      const room = (name) => name.closest(".scroll").offsetWidth;
      const wide = names.filter((name) => name.closest("table").offsetWidth > room(name));
      return wide.map((name) => name.offsetWidth / room(name));
    """)
    assert shares
    assert max(shares) < 0.55


def test_a_screen_reader_finds_names_and_headings_in_order(page: webdriver.Chrome) -> None:
    look(page, 1280, "light")
    assert page.find_elements(By.CSS_SELECTOR, NAMELESS) == []
    found = page.find_elements(By.CSS_SELECTOR, "h1, h2, h3, h4")
    levels = [int(heading.tag_name[1]) for heading in found]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_focus_is_seen(page: webdriver.Chrome) -> None:
    look(page, 1280, "light")
    for selector in ("nav a", "summary", "#filter"):
        page.execute_script("document.querySelector(arguments[0]).focus()", selector)
        page.switch_to.active_element.send_keys(Keys.SHIFT)  # as from a keyboard
        outline = page.switch_to.active_element.value_of_css_property("outline")
        assert "solid 2px" in outline, selector


def test_nothing_moves_by_itself_where_that_is_asked_for(page: webdriver.Chrome) -> None:
    for wish, wanted in (("reduce", "auto"), ("no-preference", "smooth")):
        motion = {"name": "prefers-reduced-motion", "value": wish}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [motion]})
        root = page.find_element(By.TAG_NAME, "html")
        assert root.value_of_css_property("scroll-behavior") == wanted
