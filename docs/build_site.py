"""Build the documentation site with Zensical: `make docs`, or `.venv/bin/python docs/build_site.py [FOLDER]`.

Its pages are docs/*.md and the READMEs of the repository. Links between them become links of the site; links to other
files of the repository, which a site cannot show, become plain text. A link or anchor that leads nowhere, or a name
without documentation, fails the build.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "zensical.toml"
OTHER_PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "cluster/README.md": "cluster-setup.md",
    "jobs/bench/README.md": "benchmark-details.md",
    "docs/verification/README.md": "verification.md",
}
# Code, in which nothing is a link; or an inline link or image. A link's text may hold code spans and one image.
LINK = re.compile(
    r"^ *```.*?^ *```|`[^`\n]*`"
    r"|(?P<image>!?)\[(?P<text>(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)",
    re.MULTILINE | re.DOTALL,
)


def site_pages() -> dict[str, str]:
    """Return the site's name of each page, by its path in the repository."""
    return {f"docs/{file.name}": file.name for file in sorted((ROOT / "docs").glob("*.md"))} | OTHER_PAGES


def link_target(page: str, target: str) -> str:
    """Return the path in the repository that a relative link of a page leads to. Raises ValueError if none is there."""
    path = os.path.normpath(PurePosixPath(page).parent / target)
    if path.startswith("..") or not (ROOT / path).exists():
        raise ValueError(f"{page}: a link leads to {target}, which does not exist")
    return path


def rewrite_links(page: str, text: str) -> str:
    """Return a page's text with the links of the site instead of those of the repository."""
    pages = site_pages()

    def rewrite(link: re.Match[str]) -> str:
        target, anchor = link["target"] or "", link["anchor"] or ""
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = link_target(page, target)
        if path in pages:
            return f"[{link['text']}]({pages[path]}{anchor})"
        if path.startswith("docs/images/"):
            return f"{link['image']}[{link['text']}]({path.removeprefix('docs/')})"
        return str(link["text"])

    return LINK.sub(rewrite, text)


def build(output: Path) -> int:
    """Build the site into a folder, which is replaced. Return the exit status of Zensical."""
    with tempfile.TemporaryDirectory() as temporary:
        project = Path(temporary)
        shutil.copy(ROOT / "docs" / CONFIG, project)
        shutil.copytree(ROOT / "docs" / "images", project / "docs" / "images")
        for page, name in site_pages().items():
            (project / "docs" / name).write_text(rewrite_links(page, (ROOT / page).read_text()))
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", project / CONFIG]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the reference is that of this checkout
        status = subprocess.run(command, check=False, cwd=project, env=environment).returncode
        if status == 0:
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(project / "site", output)
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "site")
    try:
        sys.exit(build(parser.parse_args().folder))
    except ValueError as problem:
        sys.exit(f"error: {problem}")
