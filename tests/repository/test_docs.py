"""README and docs/: short, with tables that are what was measured, and no link that leads nowhere."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
from benchmarks.tables import PLACE, ROOT, TABLES, filled, pages

REPOSITORY = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]
HELP = sorted((ROOT / "js" / "docs").glob("*.md"))
# Text of a screen and a half, at the width of GitHub's page.
LINES_OF_README = 80


def text(page):
    return page.read_text(encoding="utf-8")


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", text(page))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_somewhere(link, page):
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not anchor or anchor in anchors(target))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_what_the_results_give(page):
    assert text(page) == filled(text(page)), "run python -m benchmarks.tables"


def test_each_table_stands_once():
    assert sorted(place[1] for page in pages() for place in PLACE.findall(text(page))) == sorted(TABLES)


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    inside = [link for link in links(page) if not link.startswith("http")]
    assert [link for link in inside if not leads_somewhere(link, page)] == []


@pytest.mark.parametrize("page", HELP, ids=lambda page: page.stem)
def test_a_help_page_leads_to_its_questions_in_each_language(page):
    """The page of a node is shown by ComfyUI, where only a whole address leads to the repository."""
    found = links(page)
    start = f"{REPOSITORY}/blob/main/docs/"
    assert any(link.startswith(start) for link in found)
    for link in found:
        assert link.startswith(start) and leads_somewhere(link.removeprefix(start), ROOT / "docs" / "models.md"), link
    for translated in (page.parent / page.stem).glob("*.md"):
        assert links(translated) == found, translated


def test_readme_is_short_and_has_the_two_commands():
    readme = text(ROOT / "README.md")
    assert readme.count("\n") <= LINES_OF_README
    assert "\n    python dev.py demo\n    python dev.py test\n" in readme
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {
        Path(link).name for link in links(ROOT / "README.md")
    }
