"""The lens page in a real browser: what is seen, on hover too; no network, no script, no error."""
import json
import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from report.lens_view import lens_page

HOSTILE = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "&amp;",
           "\"'`", "</td>", "</style></table>", "-->", "\u05e9\u05dc\u05d5\u05dd", "\u202eabc",
           "漢字テスト", "\U0001f469\u200d\U0001f467", "·a  b"]
TAPS, TOKENS = 5, 12


@pytest.fixture(scope="module")
def driver():
    """A headless Chromium whose every name lookup fails; without one, only a CI fails."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not browser or not chromedriver:
        why = "no Chromium with chromedriver; on Debian: apt-get install chromium chromium-driver"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # no sandbox: containers have none, and the page is our own
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                     "--host-resolver-rules=MAP * ~NOTFOUND", "--force-device-scale-factor=1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # the path keeps selenium from looking for a driver to download
    driver = webdriver.Chrome(options=options, service=Service(executable_path=chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def view():
    """A view as lens.view_prompt makes it; every text of it is one the page could break on."""
    def cell(tap, t):
        shift = tap * TOKENS + t
        texts = [HOSTILE[(shift + n) % len(HOSTILE)] for n in range(9)] + [f"tap {tap} token {t}"]
        return [[text, round(0.9 / 2 ** n, 6)] for n, text in enumerate(texts)]
    return {"prompt": HOSTILE[0], "tokens": HOSTILE, "taps": ["embed", "L0", "L1", "L2", "L3"],
            "top": [[cell(tap, t) for t in range(TOKENS)] for tap in range(TAPS)],
            "entropy": [[tap + t / 100 for t in range(TOKENS)] for tap in range(TAPS)]}


@pytest.fixture
def cells(driver, view, tmp_path):
    """The page opened from a file, its window large enough for all: {(tap, t): element}."""
    path = tmp_path / "lens.html"
    path.write_text(lens_page(view), encoding="utf-8")
    driver.get_log("performance"), driver.get_log("browser")   # what earlier pages left there
    driver.set_window_size(3000, 1200)
    driver.get(path.as_uri())
    ActionChains(driver, duration=0).move_by_offset(1, 1).perform()
    found = iter(driver.find_elements(By.CLASS_NAME, "cell"))
    # the last block is on top
    cells = {(tap, t): next(found) for tap in reversed(range(TAPS)) for t in range(TOKENS)}
    assert next(found, None) is None
    return cells


def hover(driver, element):
    ActionChains(driver, duration=0).move_to_element(element).perform()


def visible_tips(driver):
    """Which tips are displayed, numbered in the page's order, and their texts.

    returns  [(number, caption, texts of the table's cells)]; one call, since each takes long
    """
    found = driver.execute_script(
        "const texts = (tip, what) => [...tip.querySelectorAll(what)].map(e => e.textContent);"
        "return [...document.querySelectorAll('.tip')].flatMap((tip, number) =>"
        " getComputedStyle(tip).display == 'none' || !tip.getClientRects().length ? []"
        " : [[number, texts(tip, 'caption'), texts(tip, 'tr > td')]])")
    return [(number, *captions, shown) for number, captions, shown in found]


def test_one_file_no_script_no_error(driver, cells, tmp_path):
    """Nothing is requested but the file itself, no text becomes an element, the console is empty.

    The recorded requests include failed ones, so blocked network cannot hide a link.
    """
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events
                 if event["method"] == "Network.requestWillBeSent"]
    assert requested == [(tmp_path / "lens.html").as_uri()]
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.execute_script("return typeof window.hacked") == "undefined"
    assert driver.find_elements(By.CSS_SELECTOR, "script, img, link") == []
    assert driver.get_log("browser") == []


def test_every_text_is_shown_as_it_is(driver, cells, view):
    """Prompt, tokens and top tokens, hostile ones included: the text itself, once, in its place."""
    assert driver.find_element(By.CSS_SELECTOR, "h1 code").text == view["prompt"]
    rows = driver.find_elements(By.CSS_SELECTOR, "main > table > tbody > tr")
    header, *blocks = [[name.get_property("textContent")
                        for name in row.find_elements(By.CSS_SELECTOR, ":scope > th")]
                       for row in rows]
    assert header == ["", *view["tokens"]]
    assert blocks == [[name] for name in reversed(view["taps"])]
    own = driver.execute_script("return arguments[0].map(cell => cell.firstChild.data)",
                                list(cells.values()))
    assert own == [view["top"][tap][t][0][0] for tap, t in cells]


def test_a_cell_shows_its_own_tip_on_hover(driver, cells, view):
    """No tip at first; then exactly the ten rows of the cell under the mouse, and none after it.

    Along the diagonals, down and to the right: each cell lies under the tip of the one before.
    """
    assert visible_tips(driver) == []
    diagonals = sorted(enumerate(cells.items()), key=lambda x: (sum(x[1][0]), x[1][0][1]))
    for number, ((tap, t), element) in diagonals:
        hover(driver, element)
        expected = [text for token, prob in view["top"][tap][t]
                    for text in (token, f"{100 * prob:.1f} %")]
        caption = f"entropy {view['entropy'][tap][t]:.2f} nats"
        assert len(expected) == 20 and visible_tips(driver) == [(number, caption, expected)]
    tip = element.find_element(By.CLASS_NAME, "tip")    # the last one, as the browser draws it
    assert tip.is_displayed() and tip.find_element(By.TAG_NAME, "td").text == expected[0]
    hover(driver, driver.find_element(By.TAG_NAME, "h1"))
    assert visible_tips(driver) == []


@pytest.mark.parametrize("tap, t", [(0, TOKENS - 1), (TAPS - 1, TOKENS - 1), (0, 0)])
def test_tips_at_the_edges_can_be_seen(driver, cells, tap, t):
    """In a small window, scrolled to the cell: its tip is all in view, and the page did not grow.

    A tip that made the page larger could be reached only by moving the mouse off its cell.
    """
    driver.set_window_size(700, 600)
    size = "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    before = driver.execute_script(size)
    driver.execute_script("arguments[0].scrollIntoView({block: 'start', inline: 'start'})",
                          cells[tap, t])
    hover(driver, cells[tap, t])
    assert len(visible_tips(driver)) == 1
    assert driver.execute_script(size) == before
    left, top, right, bottom, width, height = driver.execute_script(
        "const box = arguments[0].getBoundingClientRect(), root = document.documentElement;"
        "return [box.left, box.top, box.right, box.bottom, root.clientWidth, root.clientHeight]",
        cells[tap, t].find_element(By.CLASS_NAME, "tip"))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
