"""The documentation builds into a site, and its links lead somewhere, in the repository as on the site."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "build_site.py"
PAGES: dict[str, str] = runpy.run_path(str(SCRIPT))["site_pages"]()
MARKDOWN = MarkdownIt("commonmark").enable("table")

needs_generator = pytest.mark.skipif(
    importlib.util.find_spec("zensical") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="zensical and mkdocstrings are not installed; `make docs` installs them",
)


def tokens_of(page: Path) -> Iterator[Any]:
    for token in MARKDOWN.parse(page.read_text()):
        yield from (token, *(token.children or []))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    tokens = MARKDOWN.parse(page.read_text())
    headings = ["".join(part.content for part in tokens[index + 1].children) for index in _heading_indices(tokens)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _heading_indices(tokens: list[Any]) -> list[int]:
    return [index for index, token in enumerate(tokens) if token.type == "heading_open"]


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_anchors_of_a_page_exist(page: str) -> None:
    file = ROOT / page
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens_of(file)]
    for target in targets:
        if target and not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            linked = (file.parent / name).resolve() if name else file
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), target


def test_navigation_has_every_page_once() -> None:
    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [name for value in values for name in names(value)]

    config = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())
    assert sorted(names(config["project"]["nav"])) == sorted(PAGES.values())


def build(script: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, site], capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    process = build(SCRIPT, folder)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def page_of(site: Path, name: str) -> str:
    return (site / ("" if name == "index.md" else name.removesuffix(".md")) / "index.html").read_text()


@needs_generator
def test_site_has_the_blocks_lists_and_tables_of_each_page(site: Path) -> None:
    """Zensical's Markdown is not CommonMark: in a list, it wants four spaces, and before one an empty line."""
    tags = ("pre", "li", "table")
    for page, name in PAGES.items():
        if name != "api.md":  # the generated reference adds some
            expected = MARKDOWN.render((ROOT / page).read_text())
            article = page_of(site, name).partition("<article")[2].partition("</article>")[0]
            counts = [{tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in tags} for html in (expected, article)]
            assert counts[0] == counts[1], page


@needs_generator
def test_reference_has_the_names_of_the_python_api(site: Path) -> None:
    reference = page_of(site, "api.md")
    for name in ("config.recipe.Recipe", "config.load.load_recipe", "corpus.blocks.Blocks", "errors.UserError"):
        assert f'id="raylava.{name}"' in reference


@needs_generator
def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    for file in site.rglob("*.html"):
        html = file.read_text()
        assert not re.findall(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""", html)


@needs_generator
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[x](quickstart.md#nowhere)", "anchor does not exist"),
        ("[x](none.md)", "docs/index.md: a link leads to none.md, which does not exist"),
        ("::: raylava.config.recipe.Nothing", "raylava.config.recipe.Nothing"),
    ],
    ids=["anchor", "page", "name"],
)
def test_link_or_name_that_leads_nowhere_fails_the_build(line: str, message: str, tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if entry.name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster", "jobs", "raylava", "LICENSE"):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("CITATION.cff", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "index.md").open("a") as index:
        index.write(f"\n{line}\n")
    process = build(tmp_path / "docs" / "build_site.py", tmp_path / "site")
    assert process.returncode == 1
    assert message in re.sub(r"\x1b\[[0-9;]*m", "", process.stdout + process.stderr)
    assert not (tmp_path / "site").exists()
