"""The pages: what stands in the file, and in a real browser what is seen by mouse and by keys.

Both pages are one template, so that most is tested of both: no network, no text that becomes an
element, no error. A run's page is walked through by slider, keys, panels and the play button.
"""
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser

import matplotlib
import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, kill_and_continue, run
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from checkpoint import load_checkpoint
from config import load_config
from eval import view_end
from lens import view_prompt
from report.plot import emergence_page, lens_page
from text.arithmetic import Problem, evenly
from text.rows import load_split

HOSTILE = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>", "&amp;",
           "\"'`", "</td>", "</script><b>", "-->", "\u05e9\u05dc\u05d5\u05dd", "\u202eabc",
           "漢字テスト", "\U0001f469\u200d\U0001f467", "·a  b", "{data}", "x" * 300]
STEPS, BLOCKS, TOKENS = (0, 50, 100, 200), 30, 14


def make_view(step):
    """What lens.view_prompt makes; every text of it is one that the page could break on."""
    def cell(tap, t):
        shift = step + tap * TOKENS + t
        texts = [HOSTILE[(shift + n) % len(HOSTILE)] for n in range(9)] + [f"{step} {tap} {t}"]
        return [[text, round(abs(math.sin(shift)) / 2 ** n, 6)] for n, text in enumerate(texts)]
    taps = range(BLOCKS + 1)
    return {"prompt": HOSTILE[0], "tokens": HOSTILE[:TOKENS],
            "taps": ["embed", *(f"L{l}" for l in range(BLOCKS))],
            "top": [[cell(tap, t) for t in range(TOKENS)] for tap in taps],
            "entropy": [[tap + t / 100 + step for t in range(TOKENS)] for tap in taps],
            "words": {HOSTILE[0]: {"id": 7, "piece": HOSTILE[1], "rank": [tap + 1 for tap in taps],
                                   "prob": [tap / 100 for tap in taps]}}}


def make_records():
    """A metrics.jsonl: the lens at steps 0, 100 and 200, validation at 0, 50 and 200."""
    records = [{"step": step, "loss": 1.0} for step in range(1, 201)]
    for step in STEPS:
        record = {"step": step}
        if step != 50:
            series = {"prob": [step / 400 + tap / 100 for tap in range(BLOCKS + 1)],
                      "top1": [step / 400] * (BLOCKS + 1)}
            record |= {"view": make_view(step), "lens": {
                "class_top1": step / 200, "answer": series, "operation": series}}
        if step != 100:
            record["valid_accuracy"] = 0.5 + step / 1000
        records.append(record)
    return records


# --- the file


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def data_of(page):
    """What the script reads. Only the browser's own rule for where the element ends is used."""
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


PAGES = {"lens": lambda: lens_page(make_view(0)),
         "emergence": lambda: emergence_page(make_records(), HOSTILE[0], 16)}


@pytest.mark.parametrize("kind", PAGES)
def test_the_file_needs_nothing(kind):
    """Two scripts, both in the file; nothing that a browser would fetch; no text becomes HTML."""
    page = PAGES[kind]()
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == page.count("</script>") == 2
    assert not [a for _, a in tags if {"src", "href", "onerror", "onclick"} & a.keys()]
    assert not {"img", "link", "iframe", "b"} & {tag for tag, _ in tags}
    assert re.findall(r"https?:[^\"]+", page) == ["http://www.w3.org/2000/svg"]    # a name
    assert "url(" not in page and "@import" not in page
    policy = next(a["content"] for _, a in tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")      # the browser itself refuses a request
    assert page.partition('id="data">')[2].partition("<")[0].isascii()
    assert data_of(page)["title"].endswith(HOSTILE[0])


def test_the_numbers_are_those_of_the_records():
    """Inspections and validations as they were logged, in order; training steps stay out."""
    records = make_records()
    data = data_of(emergence_page(records, "a title", 16))
    assert data == {"title": "a title", "block": 16, "moments": records[200:]}
    assert data_of(lens_page(make_view(0)))["moments"] == [{"step": None, "view": make_view(0)}]
    assert emergence_page(records[:200], "a title", 16) == ""
    unsure = data_of(emergence_page([{"step": 0, "valid_loss": math.nan}], "", None))
    assert unsure["moments"] == [{"step": 0, "valid_loss": None}]   # NaN would be no JSON


def test_a_run_writes_its_page(write_config):
    """Each inspection holds one prompt's view; the last one is what lens.py says of the run."""
    path, folder = write_config(method="dual_reward", model=TINY)
    assert "emergence.html" in run("train.py", path, check=0).stdout
    moments = data_of((folder / "emergence.html").read_text())["moments"]
    assert [m["step"] for m in moments] == [0, 3, 6] and all("view" in m for m in moments)
    cfg = load_config(path)
    prompt = evenly(load_split(cfg, "valid"), cfg.eval_prompts)[0].prompt
    model, tokenizer, _ = load_checkpoint(folder)
    expected, last = view_prompt(model, tokenizer, prompt, []), moments[-1]["view"]
    assert (last["prompt"], last["tokens"]) == (prompt, expected["tokens"])
    assert last["taps"] == expected["taps"] and last["top"] != moments[0]["view"]["top"]
    for tap, row in enumerate(last["top"]):
        for t, top in enumerate(row):
            assert [text for text, _ in top] == [text for text, _ in expected["top"][tap][t][:5]]
            assert [p for _, p in top] == pytest.approx(
                [p for _, p in expected["top"][tap][t][:5]], abs=2e-5)


def test_a_killed_run_has_the_same_page(write_config):
    """kill -9 between two inspections: those before it are kept, the others made again."""
    keys = {"method": "dual_reward", "steps": 20}
    path, whole = write_config("whole", **keys)
    run("train.py", path, check=0)
    path, killed = write_config("killed", **keys)
    kill_and_continue(path, killed)
    pages = [(folder / "emergence.html").read_bytes() for folder in (whole, killed)]
    assert pages[0] == pages[1] and pages[0].count(b'"view":') == 8     # steps 0, 3, ... 18, 20


def test_of_a_long_prompt_the_end_is_kept():
    model, tokenizer, _ = load_checkpoint(TINY)
    prompt = "add 1 and 2 " * 12
    view = view_end(model, tokenizer, Problem(prompt, "3", "add", "worded"), "none")
    whole = view_prompt(model, tokenizer, prompt, [])
    assert len(view["tokens"]) == 16 < len(whole["tokens"])
    assert view["tokens"] == whole["tokens"][-16:] and view["prompt"] == prompt[-200:]
    assert [[top[0][0] for top in row] for row in view["top"]] == [
        [top[0][0] for top in row[-16:]] for row in whole["top"]]
    np.testing.assert_allclose(view["entropy"], np.array(whole["entropy"])[:, -16:],
                               atol=1e-3)
    assert mx.isfinite(mx.array(view["kl"])).all()


# --- in a browser


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


@pytest.fixture
def show(driver, tmp_path):
    """show(kind): open a page from a file in a large window, the mouse on its title."""
    def show(kind, width=2400, height=1200):
        path = tmp_path / f"{kind}.html"
        path.write_text(PAGES[kind](), encoding="utf-8")
        driver.get_log("performance"), driver.get_log("browser")   # what earlier pages left there
        driver.set_window_size(width, height)
        driver.get(path.as_uri())
        hover(driver, driver.find_element(By.TAG_NAME, "h1"))
        return path.as_uri()
    return show


def table_of(driver):
    """(heads, row names from the top, {(tap, column): text}) by one call: each takes long."""
    heads, names, rows = driver.execute_script(
        "const all = (e, what) => [...e.querySelectorAll(what)].map(e => e.textContent);"
        "const rows = [...document.querySelectorAll('#lens tbody tr')];"
        "return [all(document, '#lens thead tr:last-child th'), rows.map(r => all(r, 'th')[0]),"
        " rows.map(r => all(r, 'td'))]")
    return heads, names, {(len(rows) - 1 - n, c): text for n, row in enumerate(rows)
                          for c, text in enumerate(row)}


def cell(driver, tap, column):
    row = f"#lens tbody tr:nth-child({BLOCKS + 1 - tap}) td:nth-child({column + 2})"
    return driver.find_element(By.CSS_SELECTOR, row)


def tip_of(driver):
    """The tip's caption and rows, and its box with the window's; None where none is shown."""
    return driver.execute_script(
        "const tip = document.getElementById('tip');"
        "if (tip.hidden || getComputedStyle(tip).display === 'none') return null;"
        "const b = tip.getBoundingClientRect(), root = document.documentElement;"
        "return {caption: tip.querySelector('caption').textContent,"
        " rows: [...tip.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent)),"
        " inside: b.left >= 0 && b.top >= 0 && b.right <= root.clientWidth"
        "   && b.bottom <= innerHeight && b.width > 0}")


def tip_wanted(view, tap, t):
    return (f"entropy {view['entropy'][tap][t]:.2f} nats",
            [[text, f"{100 * p:.1f} %"] for text, p in view["top"][tap][t]])


def hover(driver, element):
    ActionChains(driver, duration=0).move_to_element(element).perform()


def press(driver, *keys):
    for key in keys:
        ActionChains(driver, duration=0).send_keys(key).perform()


def step_of(driver):
    return int(driver.find_element(By.ID, "now").text.split()[1])


@pytest.mark.parametrize("kind", PAGES)
def test_one_file_no_error(driver, show, kind):
    """Nothing is requested but the file itself, no text becomes an element, the console is empty.

    The recorded requests include failed ones, so blocked network cannot hide a link.
    """
    address = show(kind)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requested = [event["params"]["request"]["url"] for event in events
                 if event["method"] == "Network.requestWillBeSent"]
    assert requested == [address]
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.execute_script("return typeof window.hacked") == "undefined"
    assert len(driver.find_elements(By.TAG_NAME, "script")) == 2
    assert driver.find_elements(By.CSS_SELECTOR, "img, link, b") == []
    assert driver.title.endswith(HOSTILE[0]) and driver.get_log("browser") == []


@pytest.mark.parametrize("kind", PAGES)
def test_every_text_is_shown_as_it_is(driver, show, kind):
    """Title, tokens and top tokens, hostile ones included: the text itself, in its place."""
    show(kind)
    view = make_view(0 if kind == "lens" else 200)
    assert driver.find_element(By.TAG_NAME, "h1").get_property("textContent").endswith(HOSTILE[0])
    heads, names, cells = table_of(driver)
    followed = [HOSTILE[0]] + ([] if kind == "lens" else ["answer", "operation"])
    assert heads == ["", *view["tokens"], *followed] and names == view["taps"][::-1]
    assert len(cells) == (BLOCKS + 1) * (TOKENS + len(followed))
    expected = []
    for tap, c in cells:
        value = f"{100 * (tap / 100 + 0.5 * (c > TOKENS)):.1f} %"
        expected.append(view["top"][tap][c][0][0] if c < TOKENS else value)
    assert list(cells.values()) == expected


@pytest.mark.parametrize("kind", PAGES)
def test_a_cell_shows_its_own_tip_on_hover(driver, show, kind):
    """None at first; then all rows of the cell under the mouse, also where the last tip lies."""
    show(kind)
    view = make_view(0 if kind == "lens" else 200)
    assert tip_of(driver) is None
    for n in range(0, TOKENS):      # down and to the right: each under the tip of the one before
        for tap in (BLOCKS - n, BLOCKS - n - 1):
            hover(driver, cell(driver, tap, n))
            tip = tip_of(driver)
            assert (tip["caption"], tip["rows"]) == tip_wanted(view, tap, n) and tip["inside"]
    hover(driver, cell(driver, 3, TOKENS))
    assert tip_of(driver)["rows"] == [["token", f"{HOSTILE[1]} (7)"], ["probability", "3.0 %"],
                                      ["rank", "4"]]
    hover(driver, driver.find_element(By.TAG_NAME, "h1"))
    assert tip_of(driver) is None


@pytest.mark.parametrize("tap, t", [(0, TOKENS - 1), (BLOCKS, TOKENS - 1), (0, 0)])
def test_tips_at_the_edges_can_be_seen(driver, show, tap, t):
    """In a small window, scrolled to the cell: its tip is in view, and the page did not grow."""
    show("emergence", 700, 600)
    size = "return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
    before = driver.execute_script(size)
    assert before[0] <= 700     # a wide table scrolls by itself
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'end'})",
                          cell(driver, tap, t))
    hover(driver, cell(driver, tap, t))
    assert tip_of(driver)["rows"] == tip_wanted(make_view(200), tap, t)[1]
    assert tip_of(driver)["inside"] and driver.execute_script(size) == before


def test_keys_walk_through_the_steps(driver, show):
    """Left, right, Home and End, wherever the focus is; the table follows, what lacks stays."""
    show("emergence")
    assert step_of(driver) == 200
    for element in ("body", "#step"):
        if element == "#step":
            driver.execute_script("document.getElementById('step').focus()")
        for key, step in ((Keys.HOME, 0), (Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 50),
                          (Keys.ARROW_RIGHT, 100), (Keys.END, 200), (Keys.ARROW_RIGHT, 200)):
            press(driver, key)
            assert step_of(driver) == step, (element, key)
            # at step 50 nothing was looked at: the table still says what step 0 said
            seen, (_, _, cells) = make_view(0 if step == 50 else step), table_of(driver)
            for (tap, t), text in cells.items():
                assert t >= TOKENS or text == seen["top"][tap][t][0][0]
    assert driver.find_element(By.ID, "step").get_attribute("aria-valuetext") == "step 200"
    assert driver.get_log("browser") == []


def test_keys_walk_through_the_table(driver, show):
    """Tab comes to one cell, the arrows to its neighbours; each shows its tip; Escape closes it."""
    show("emergence")
    press(driver, Keys.TAB, Keys.TAB, Keys.TAB)    # play, slider, table
    view, tap, t = make_view(200), BLOCKS, 0
    for key, up, right in ((None, 0, 0), (Keys.ARROW_LEFT, 0, 0), (Keys.ARROW_UP, 0, 0),
                           (Keys.ARROW_DOWN, -1, 0), (Keys.ARROW_RIGHT, 0, 1),
                           (Keys.ARROW_UP, 1, 0), (Keys.ARROW_RIGHT, 0, 1)):
        if key:
            press(driver, key)
        tap, t = tap + up, t + right
        tip = tip_of(driver)
        assert (tip["caption"], tip["rows"]) == tip_wanted(view, tap, t) and tip["inside"]
    press(driver, Keys.END)
    assert tip_of(driver)["caption"] == "operation word, over validation prompts"
    assert step_of(driver) == 200                   # the table's keys are not the steps'
    press(driver, Keys.ESCAPE)
    assert tip_of(driver) is None
    press(driver, Keys.TAB)
    assert driver.execute_script("return document.activeElement.tagName") != "TD"


def test_the_slider_is_dragged(driver, show):
    """From its right end to its left and part of the way back; an open tip follows."""
    show("emergence")
    slider = driver.find_element(By.ID, "step")
    half = slider.size["width"] // 2
    for back, step in ((0, 0), (round(2 * half / 3), 50)):
        press(driver, Keys.END)
        drag = ActionChains(driver, duration=50).move_to_element_with_offset(slider, half - 8, 0)
        drag.click_and_hold().move_by_offset(-2 * half + 16, 0)
        drag.move_by_offset(back, 0).release().perform()
        assert step_of(driver) == step
    hover(driver, cell(driver, 4, 2))
    press(driver, Keys.END)
    assert tip_of(driver)["rows"] == tip_wanted(make_view(200), 4, 2)[1]


def test_panels_have_a_cursor_that_is_dragged(driver, show):
    """Blocks by steps for word and answer, and the shares: the cursors and the values follow."""
    show("emergence")
    assert [e.text for e in driver.find_elements(By.CSS_SELECTOR, "#panels h2")] == [
        "operation word, mean probability after each block",
        "answer's first token, mean probability after each block", "share of validation prompts"]
    heat, _, shares = driver.find_elements(By.CSS_SELECTOR, "#panels svg")
    assert len(heat.find_elements(By.CLASS_NAME, "ground")) == 3 * BLOCKS   # three inspections
    keys = [e.text for e in driver.find_elements(By.CLASS_NAME, "key")]
    assert [key.partition(" ")[2].lstrip("– ") for key in keys] == [
        "answers right 70.0 %", "operation word top-1 at L16 100.0 %"]
    # a curve's points lie where their numbers say
    places = driver.execute_script("return [...arguments[0].querySelectorAll('circle')].map("
                                   "c => [+c.getAttribute('cx'), +c.getAttribute('cy')])", shares)
    right, word = places[:3], places[3:]
    assert [x for x, _ in right][::2] == [x for x, _ in word][::2]     # steps 0 and 200
    assert (right[1][0] - right[0][0]) / (right[2][0] - right[0][0]) == pytest.approx(50 / 200)
    zero, one = word[0][1], word[2][1]
    assert [(y - zero) / (one - zero) for _, y in right] == pytest.approx([0.5, 0.55, 0.7])
    # to the left edge, held
    half = shares.size["width"] // 2
    drag = ActionChains(driver, duration=50).move_to_element_with_offset(shares, half - 20, 0)
    drag.click_and_hold().move_by_offset(-2 * half + 60, 0).release().perform()
    assert step_of(driver) == 0
    lines = driver.find_elements(By.CLASS_NAME, "cursor")
    assert [float(line.get_attribute("x1")) for line in lines] == pytest.approx(
        6 * [right[0][0]])
    keys = [e.text for e in driver.find_elements(By.CLASS_NAME, "key")]
    assert keys[0].endswith("answers right 50.0 %") and keys[1].endswith("top-1 at L16 0.0 %")


def test_play_walks_to_the_end_and_stops(driver, show):
    show("emergence")
    button = driver.find_element(By.ID, "play")
    # what is shown is noted by the page itself: a busy machine may ask too late
    driver.execute_script("window.walked = []; const now = document.getElementById('now');"
                          "new MutationObserver(() => walked.push(now.textContent))"
                          ".observe(now, {childList: true})")
    button.click()
    wait = WebDriverWait(driver, 30)
    wait.until(lambda _: len(driver.execute_script("return walked")) == 4)
    assert driver.execute_script("return walked") == [f"step {step}" for step in STEPS]
    wait.until(lambda _: button.text == "play")
    assert step_of(driver) == 200


def test_light_and_dark_and_a_colour_scale_for_all(driver, show):
    """The system's choice is followed; viridis within rounding; letters of contrast 4.5 or more."""
    look = ("const c = getComputedStyle(document.body);"
            "return [c.backgroundColor, c.color].map(v => v.match(/\\d+/g).map(Number))")
    for mode in ("light", "dark"):
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": mode}]})
        show("lens")
        back, text = driver.execute_script(look)
        assert (sum(back) > sum(text)) == (mode == "light")
        assert contrast(back, text) > 10
    scale = [n / 200 for n in range(201)]
    found = np.array(driver.execute_script("return arguments[0].map(rgb)", scale))
    wanted = 255 * matplotlib.colormaps["viridis"](scale)[:, :3]
    assert np.abs(found - wanted).max() < 6
    letters = driver.execute_script("return arguments[0].map(p => ink(rgb(p)))", scale)
    assert set(letters) == {"#000", "#fff"}
    for colour, ink in zip(found, letters):
        assert contrast(colour, [0] * 3 if ink == "#000" else [255] * 3) >= 4.5


def contrast(first, second):
    """WCAG 2's ratio of two colours of 0 to 255, from 1 to 21."""
    def luminance(colour):
        c = np.asarray(colour) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)
