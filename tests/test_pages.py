"""The documents are as wide as a screen, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WIDTH = 100


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name
)
def test_pages_are_no_wider_than_a_screen(page):
    """Tables, addresses, code, and what a command wrote may be wider."""
    fenced, generated, wide = False, False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.startswith("```")
        generated = line.startswith("<!-- begin") or (generated and not line.startswith("<!-- end"))
        is_free = fenced or generated or line.startswith(("|", "    ")) or "](http" in line
        if len(line) > WIDTH and not is_free:
            wide.append(number)
    assert not wide


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")):
        path, anchor = target
        if path.startswith("http"):
            continue
        led = page.parent / path if path else page
        assert led.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", led.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in slugs, target
