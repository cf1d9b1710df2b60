"""The report and the page of runs side by side in a browser: drawn, silent, light, dark, on a phone, by keyboard."""

import json
import re
from pathlib import Path

import pytest

from bertpipe.downstream.reporting import from_runs, pages
from bertpipe.downstream.reporting.figures import make_figures
from tests.browser import PHONE, chromium, opened
from tests.downstream.test_from_runs import PHASES, copy_run
from tests.downstream.test_report import HOSTILE, make, understood_run


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def facts(finished_run, tmp_path_factory) -> tuple[Path, dict]:
    """The page of a whole run, and its facts."""
    folder = tmp_path_factory.mktemp("understood")
    _, _, found = make(folder / "out", understood_run(finished_run, folder))
    return folder / "out" / "report.html", found


@pytest.fixture(scope="module")
def report(browser, facts):
    """That page, opened; so large a one is opened once."""
    with opened(browser, facts[0]) as found:
        yield found


@pytest.fixture(scope="module")
def beside(browser, finished_run, tmp_path_factory):
    """The page of two pretraining runs, one with phases, and a finetune artifact, opened."""
    folder = tmp_path_factory.mktemp("runs")
    train = {"steps": 240, "sequence_length": 64, "slot_tokens": 8192}
    settings = {"train": train, "report": {"title": HOSTILE}}
    runs = [
        copy_run(finished_run["pretrain"], folder, "pretrain-a", settings),
        copy_run(finished_run["pretrain"], folder, "pretrain-b", {"train": train | {"phases": PHASES}}),
        copy_run(finished_run["finetune"], folder, "finetune-c", settings),
    ]
    from_runs.write(runs, folder / "page.html")
    with opened(browser, folder / "page.html") as found:
        yield found


def drawn(page) -> dict[str, int]:
    """Lines, points and bars of each plot."""
    page.wait_for_function("() => [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    count = (
        "plots => plots.map(p => [p.dataset.figure, p.querySelectorAll('.trace path, .trace image, .hm image').length])"
    )
    return dict(page.locator(".plot").evaluate_all(count))


SOUND = """() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const levels = all("h1, h2, h3").map((one) => Number(one.tagName[1]));
  return {
    lang: document.documentElement.lang,
    landmarks: ["header", "nav[aria-label]", "main", "footer"].map((one) => all(one).length),
    jumps: levels.filter((level, at) => level > (levels[at - 1] || 0) + 1).length,
    firsts: levels.filter((level) => level === 1).length,
    plots: all(".plot").filter((one) => one.getAttribute("role") !== "img" || one.ariaLabel.length < 30).length,
    headers: all("th:not([scope])").length,
    regions: all(".scroll").filter((one) => one.tabIndex !== 0 || one.getAttribute("role") !== "region"
      || !one.ariaLabel).length,
    fields: all("input, textarea, button").filter((one) => !(one.labels || []).length && !one.textContent).length,
    ids: all("[id]").length - new Set(all("[id]").map((one) => one.id)).size,
    links: all("a[href]").filter((one) => !document.querySelector(one.getAttribute("href"))).length,
  };
}"""
WANTED = {"lang": "en", "landmarks": [1, 1, 1, 1], "firsts": 1}
WANTED |= dict.fromkeys(("jumps", "plots", "headers", "regions", "fields", "ids", "links"), 0)


def silent(found) -> bool:
    """Whether nothing was said, and nothing asked for but the page itself."""
    return not found.said and found.asked == [found.page.url]


def test_the_explorer_by_keyboard(report):
    """From the head of the page with Tab alone, every stop to be seen; what is typed stays text."""
    page, stops = report.page, []
    while "explorer-text" not in stops and len(stops) < 80:
        page.keyboard.press("Tab")
        stop, outline = page.evaluate("""() => {
            const one = document.activeElement;
            return [one.id || one.textContent.trim(), getComputedStyle(one).outlineStyle];
        }""")
        stops.append(stop)
        assert outline != "none", stop
    assert stops[:2] == ["To the content", "Pretraining"] and stops[-1] == "explorer-text"
    page.keyboard.press("Control+A")
    page.keyboard.type("The [MASK] of names!<b>")
    pieces = page.locator("#explorer-pieces span").all_text_contents()
    assert pieces == ["the", "[MASK]", "of", "names", "[UNK]", "[UNK]", "b", "[UNK]"]
    assert page.locator("#explorer-count").text_content() == "8 pieces, 8 words and marks, 3 unknown"
    page.locator("#explorer-text").fill(HOSTILE)
    assert page.locator("#explorer-pieces *:not(b, span)").count() == 0 and silent(report)


def test_the_report(report, facts):
    """Every plot is drawn, the page says nothing, asks for nothing, and reads well aloud."""
    page, figures = report.page, make_figures(facts[1])
    assert set(drawn(page)) == {f"figure-{name}" for name in figures}
    assert all(count > 0 for count in drawn(page).values()), drawn(page)
    assert drawn(page)["figure-loss"] >= 4 + 6, "raw, smooth, hold-out with its six points, floor"
    assert page.evaluate(SOUND) == WANTED
    label = page.locator("[data-figure=figure-loss]").get_attribute("aria-label")
    assert re.match(r"loss \(nats per predicted token\) by optimizer step\. training: from [78]\.\d+ at 1 to ", label)
    assert "unigram cross-entropy: 5.94 throughout" in label
    page.locator("button[data-copy]").first.press("Enter")
    page.wait_for_function("() => document.getElementById('status').textContent")
    assert page.evaluate("getSelection().toString()") == facts[1]["artifacts"][0]["fingerprint"]
    assert silent(report)


def test_runs_side_by_side(beside):
    """Curves of all runs; the switch, by keyboard, puts them over tokens and hours."""
    page = beside.page
    assert all(count > 0 for count in drawn(page).values()) and len(drawn(page)) == 8
    assert page.evaluate(SOUND) == WANTED
    shown = """() => {
        const { layout, data } = document.querySelector("[data-figure=figure-loss]");
        return [layout.xaxis.title.text, data.map((one) => one.name), data[1].x.at(-1), data[5].x.at(-1)];
    }"""
    for expected, last in (("optimizer step", 240), ("tokens seen", 240 * 8_050), ("hours of training", 0.05)):
        page.locator("[data-figure=figure-throughput] .xtitle").filter(has_text=expected).wait_for()
        axis, names, *ends = page.evaluate(shown)
        assert axis == expected and ends == pytest.approx([last] * 2)
        assert names == ["A training", "A", "B training", "B", "B, longer sequences", "unigram cross-entropy"]
        page.locator("input[name=axis]:checked").press("ArrowRight")
    assert silent(beside)


@pytest.mark.parametrize("which", ["report", "beside"])
def test_dark_and_on_a_phone(request, which):
    """Nothing but tables that scroll by themselves is wider than the screen; colours follow the reader's system."""
    found = request.getfixturevalue(which)
    page, line = found.page, "getComputedStyle(document.querySelector('[data-figure=figure-loss] .js-line')).stroke"
    drawn(page)
    light = page.evaluate(line)
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"before => {line} !== before", arg=light)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    page.wait_for_function("() => document.querySelector('[data-figure=figure-loss] svg').clientWidth < 390")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    page.wait_for_function(
        f"() => document.scrollingElement.scrollWidth === {PHONE['width']}"
    )  # plots follow by and by
    assert min(drawn(page).values()) > 0 and silent(found)


# --- contrast ---------------------------------------------------------------------------------------------------------

STYLE = (pages.TEMPLATES / "style.css").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in re.findall(r":root \{([^}]*)\}", STYLE))


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(colours):
    """Text 4.5 to 1, curves 3 to 1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert len(colours) == 17
    for name in ("ink", "muted", "accent", "warn"):
        for ground in ("paper", "card", "tint"):
            assert contrast(colours[name], colours[ground]) >= 4.5, f"{name} on {ground}"
    for number in range(8):  # the last points and names of curves are written in them
        assert contrast(colours[f"run{number}"], colours["card"]) >= 4.5, number


def test_data_for_scripts_is_no_markup(facts):
    html = facts[0].read_text(encoding="utf-8")
    for body in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.S):
        assert not re.search("[<>&']", body) and json.loads(body)
