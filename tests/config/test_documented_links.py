"""Every link of the pages leads to a file that is there, and to a heading of it; on the site as in the repository."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("docs", "experiments", "integrations", "data", ".github")
PAGES = sorted(ROOT.glob("*.md")) + [page for room in ROOMS for page in sorted((ROOT / room).rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")
ABOVE = "../../actions/"
"""Of the badges: a path of the repository's page, not of its files."""


def headings(page):
    """The anchors that a page's headings have."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {heading.strip().replace(" ", "-") for heading in plain}


def taken_by_the_site():
    """The suffixes of experiments' files that docs/reference.py takes into the site."""
    tree = ast.parse((ROOT / "docs" / "reference.py").read_text(encoding="utf-8"))
    (found,) = (
        ast.literal_eval(node.comparators[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "path.suffix"
    )
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_what_is_there(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if path.startswith(ABOVE):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in headings(target), f"{path}#{anchor}"
        if ROOT / "experiments" in page.parents and target.is_file():
            assert target.suffix in taken_by_the_site() or ROOT / "experiments" not in target.parents, path
