"""The notes on measurements: dated, indexed, and where other files say that they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support_paths import ROOT

FOLDER = ROOT / "bench" / "notes"
INDEX = FOLDER / "README.md"
NOTES = sorted(set(FOLDER.glob("*.md")) - {INDEX})
WIDTH = 100


@pytest.mark.parametrize("note", NOTES, ids=lambda path: path.stem)
def test_note_is_dated_and_says_what_the_question_was(note: Path) -> None:
    text = note.read_text()
    date = re.match(r"\d{4}-\d{2}-\d{2}(?=-)", note.name)
    assert date and text.splitlines()[2].startswith(date[0])
    assert text.startswith("# ") and re.search(r"^## (Question|What)", text, re.MULTILINE)


def test_index_has_every_note_with_its_date() -> None:
    listed = re.findall(r"^\| (\S+) \| \[.+?\]\((\S+)\) \| .+ \|$", INDEX.read_text(), re.MULTILINE)
    assert sorted(name for _, name in listed) == [note.name for note in NOTES]
    assert all(name.startswith(date) for date, name in listed)


@pytest.mark.parametrize("path", [INDEX, *NOTES], ids=lambda path: path.stem)
def test_lines_are_short_and_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    assert [line for line in text.splitlines() if len(line) > WIDTH and not line.startswith("|")] == []
    links = re.findall(r"\]\(([^)#]+)", text)
    named = re.findall(r"`((?:bench|csrc|tests)/[\w/.-]+)`", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_notes_that_the_sources_name_exist() -> None:
    folders = ("csrc", "riformer_kernels", "python", "bench", "examples")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in _SOURCES]
    named = {(path, note) for path in sources for note in _NOTE.findall(path.read_text())}
    assert {note for _, note in named} <= {str(path.relative_to(ROOT)) for path in [INDEX, *NOTES]}, named


_SOURCES = {".h", ".cpp", ".cu", ".py", ".txt", ".cmake", ".sh"}
_NOTE = re.compile(r"bench/(?:NOTES|notes/[\w-]+)\.md")
