"""Every relative link of every page leads somewhere, and every command named in one exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def test_every_relative_link_resolves():
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken, "\n".join(broken)


def test_every_module_that_a_page_runs_exists():
    missing = [
        f"{page.relative_to(ROOT)}: {module}"
        for page in PAGES
        for module in re.findall(r"python -m ((?:launch|tools)[\w.]*)", page.read_text())
        if not (ROOT / module.rstrip(".").replace(".", "/")).with_suffix(".py").exists()
        and not (ROOT / module.replace(".", "/") / "__main__.py").exists()
    ]
    assert not missing, "\n".join(missing)


def test_every_file_of_the_reading_tour_exists():
    tour = (ROOT / "README.md").read_text().split("## A reading tour")[1].split("```")[0]
    named = re.findall(r"`([\w/]+\.py)`", tour)
    assert len(named) >= 7
    assert [n for n in named if "/" in n and not (ROOT / n).exists()] == []
