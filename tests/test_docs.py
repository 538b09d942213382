"""What is written is compared with what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

import calibrators

DOCS = Path(__file__).parent.parent / "docs" / "kinds"
HEADINGS = ("**Use it when**", "**Do not use it when**", "**What it costs:**", "**What it guarantees:**", "**Source:**")


def test_every_kind_has_its_page_and_every_page_its_kind() -> None:
    assert sorted(page.stem for page in DOCS.glob("*.md")) == calibrators.kinds()


@pytest.mark.parametrize("kind", calibrators.kinds())
def test_a_page_says_when_when_not_what_it_costs_and_what_it_guarantees(kind: str) -> None:
    text = (DOCS / f"{kind}.md").read_text()
    assert text.startswith(f"# {kind}\n")
    assert all(heading in text for heading in HEADINGS)


def test_the_readme_names_every_kind() -> None:
    readme = (DOCS.parent.parent / "README.md").read_text()
    assert [kind for kind in calibrators.kinds() if f"`{kind}`" not in readme] == []
