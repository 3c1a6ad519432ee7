"""Every page in a real browser: it shows all of its figures, requests nothing, and fits a phone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.pipeline.run_report.data import ReportSubject, report_data
from raylava.pipeline.run_report.page import render_report
from raylava.pipeline.run_report.stages import stages_of_run
from raylava.storage import storage_path
from tests.support.chromium import DESKTOP, PHONE, Browser, chromium, missing_program
from tests.support.run_artifacts import build_run

pytestmark = pytest.mark.skipif(
    missing_program() is not None, reason=f"{missing_program()} is not installed (apt: chromium, chromium-driver)"
)
PAGES = ("report", "corpus", "comparison", "sweep")
INJECTION = '</p><script>document.title = "injected"</script><img src="https://example.invalid/x.png">'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def artifacts(toy_assets: Artifact, folder: Path) -> dict[str, Artifact]:
    """The artifacts of a run with a question that tries to be markup, and with a restart of its training."""
    recipe, artifacts = build_run(toy_assets, folder / "storage")
    (folder / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    questions = Path((artifacts["evaluate heldout"].path / "questions.jsonl").path)
    first, second, rest = questions.read_text().split("\n", 2)
    questions.write_text("\n".join([first, json.dumps(json.loads(second) | {"text": INJECTION}), rest]))
    (artifacts["finetune"].path / "tensorboard" / "events.out.tfevents.2").write_bytes(b"")
    return artifacts


@pytest.fixture(scope="module")
def data(artifacts: dict[str, Artifact], folder: Path) -> dict[str, Any]:
    """The data of the report, whose page is written beside the other pages."""
    subject = ReportSubject("toy", stages_of_run(artifacts), storage_path(folder / "storage"), "raylava run toy.yaml")
    images: dict[str, str] = {}
    data = report_data(subject, images)
    (folder / "report.html").write_text(render_report(data, images))
    return data


@pytest.fixture(scope="module")
def pages(data: dict[str, Any], artifacts: dict[str, Artifact], folder: Path) -> dict[str, Path]:
    """The path of each page."""
    storage, sweep = folder / "storage", folder / "sweep.yaml"
    axes = {"rate": {"unchanged": {"finetune.lr": 1e-3}, "lower": {"finetune.lr": 1e-6}}}
    sweep.write_text(json.dumps({"name": "rates", "recipe": str(folder / "recipe.yaml"), "axes": axes}))
    evaluations = [str(artifacts[f"evaluate heldout{suffix}"].path) for suffix in ("", " (blank)")]
    corpus = str(artifacts["prepare instruction"].path)
    assert main(["inspect", corpus, "--html", str(folder / "corpus.html")]) == 0
    assert main(["compare", *evaluations, "--html", str(folder / "comparison.html")]) == 0
    assert main(["report", str(sweep), "--storage", str(storage)]) == 0
    return {name: folder / f"{name}.html" for name in PAGES[:-1]} | {"sweep": storage / "sweeps/rates/report.html"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page_requests_nothing_and_the_console_has_no_error(
    name: str, size: tuple[int, int], pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages[name], size)
    assert browser.requests() == [pages[name].as_uri()]
    assert browser.console_errors() == []


@pytest.mark.parametrize("name", PAGES)
def test_page_does_not_scroll_sideways_on_a_phone(name: str, pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages[name], PHONE)
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    width = browser.run("return document.documentElement.scrollWidth")
    assert width == PHONE[0]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_dark_where_the_system_is(name: str, pages: dict[str, Path], browser: Browser) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        browser.open(pages[name], scheme=scheme)
        style = browser.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", color)[:3])) / 765 for color in style]
    background, text = brightness["light"]
    assert background > 0.9 > 0.3 > text
    background, text = brightness["dark"]
    assert background < 0.2 < 0.7 < text


def _numbers(value: Any) -> Iterator[float]:
    """Yield every number of a JSON value, except the points of curves."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "points":
                yield from _numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def test_every_figure_of_the_data_is_on_the_page(
    data: dict[str, Any], pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages["report"])
    shown = {float(text) for text in browser.run("return [...document.querySelectorAll('data')].map(d => d.value)")}
    missing = set(_numbers(data)) - shown
    assert len(set(_numbers(data))) > 50
    assert not missing, missing


def test_curves_are_those_of_the_data(data: dict[str, Any], pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"])
    drawn = browser.run(
        "return [...document.querySelectorAll('svg[data-curve]')].map(s => ({"
        "...s.dataset, name: s.dataset.curve, points: s.querySelector('polyline').getAttribute('points')}))"
    )
    curves = [curve for run in data["training"] for curve in run["curves"]]
    assert [curve["name"] for curve in drawn] == [curve["name"] for curve in curves]
    for svg, curve in zip(drawn, curves, strict=True):
        left, top, right, bottom = map(float, svg["area"].split())
        (x_low, x_high), (y_low, y_high) = (map(float, svg[axis].split()) for axis in "xy")
        points = [tuple(map(float, point.split(","))) for point in svg["points"].split()]
        for (x, y), (step, value) in zip(points, curve["points"], strict=True):
            assert x_low + (x - left) / (right - left) * (x_high - x_low) == pytest.approx(step, abs=0.02)
            assert y_low + (bottom - y) / (bottom - top) * (y_high - y_low) == pytest.approx(
                value, abs=(y_high - y_low) / 1000
            )


def test_every_answer_stage_and_setting_is_on_the_page(
    data: dict[str, Any], pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages["report"])
    text = browser.run("return document.body.textContent")
    expected = [data["reproduce"]["settings"], data["reproduce"]["command"]]
    expected += [entry["event"] for entry in data["failures"]]
    for row in data["stages"]:
        expected += [row["label"], row["path"], row["state"]]
    for card in data["galleries"][0]["cards"]:
        expected += [
            card["question"],
            card["answer"],
            *card["references"],
            *(each["answer"] for each in card["baselines"]),
        ]
    assert [part for part in expected if part not in text] == []
    assert data["failures"]


def test_text_from_data_is_no_markup(pages: dict[str, Path], browser: Browser) -> None:
    for name in ("report", "comparison"):
        browser.open(pages[name])
        assert browser.run("return document.title") != "injected"
        assert browser.run("return document.body.textContent").count(INJECTION) == 1, name


def _filter(browser: Browser, **values: str) -> list[str]:
    """Set filters of the gallery and return the visible cards' texts. Typing is what a user does."""
    for name, value in values.items():
        browser.run(
            "const control = document.querySelector(`[name=${arguments[0]}]`); control.value = arguments[1];"
            "control.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )
    return browser.run(
        "return [...document.querySelectorAll('[data-gallery] .card')].filter(c => c.getClientRects().length)"
        ".map(c => c.textContent)"
    )


def test_filters_select_by_verdict_category_and_text(
    data: dict[str, Any], pages: dict[str, Path], browser: Browser
) -> None:
    browser.open(pages["report"])
    cards = data["galleries"][0]["cards"]

    def count(**wanted: str) -> int:
        return sum(all(card[key] == value for key, value in wanted.items()) for card in cards)

    assert len(_filter(browser)) == len(cards) == 20
    assert len(_filter(browser, verdict="right")) == count(verdict="right") > 0
    assert len(_filter(browser, verdict="wrong")) == count(verdict="wrong") > 0
    (category, *_) = data["galleries"][0]["categories"]
    both = count(verdict="wrong", category=category)
    assert len(_filter(browser, category=category)) == both
    assert browser.run("return document.querySelector('[data-gallery] output').textContent") == f"{both} of 20 shown"
    assert len(_filter(browser, verdict="")) == count(category=category) > both
    (found,) = _filter(browser, category="", search="HELDOUT-00007")
    assert "heldout-00007" in found
    assert _filter(browser, search="no such text") == []
    assert len(_filter(browser, search="")) == 20


def test_images_of_the_gallery_are_displayed(pages: dict[str, Path], browser: Browser) -> None:
    browser.open(pages["report"])
    sizes = browser.run(
        "return Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth, () => 0)))"
    )
    assert len(sizes) >= 20
    assert min(sizes) > 0
