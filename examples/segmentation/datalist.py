"""Reads datalists in the form of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from segmentation.files import fail, refuse_all
from segmentation.preparation import Entry

#: Sections that this job knows. "training" adapts, "validation" chooses the best step, and "test",
#: if there is one with labels, is what the report is about.
SECTIONS = ("training", "validation", "test")


def read_datalist(file: Path) -> dict[str, list[Entry]]:
    """The entries of every section, with paths relative to the folder of the file.

    A "test" section without labels, as the Decathlon has, is left out.
    """
    content, sections = _read(file), {}
    problems: list[str] = []
    for section in SECTIONS:
        entries = content.get(section)
        if entries is None and section == "test":
            continue
        if not isinstance(entries, list) or not entries:
            came = "none" if entries is None else f"{entries!r:.60}"
            hint = " (some of the training volumes)" if section == "validation" else ""
            problems.append(f"expected a list of volumes under {section!r}{hint}, got {came}")
        elif section != "test" or not all(_has_no_label(entry) for entry in entries):
            wrong = [_wrong(f"{section}[{i}]", entry) for i, entry in enumerate(entries)]
            problems += [text for text in wrong if text is not None]
            sections[section] = entries
    refuse_all("--data", file, problems)
    return {
        section: [_resolved(file.parent, entry) for entry in entries]
        for section, entries in sections.items()
    }


def class_names(file: Path) -> dict[int, str]:
    """Names of classes, from the "labels" of a datalist, ``{"1": "liver"}`` or the other way."""
    labels = _read(file).get("labels")
    named = {}
    for key, value in labels.items() if isinstance(labels, dict) else []:
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        if str(number).isdecimal() and isinstance(name, str):
            named[int(number)] = name
    return named


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        fail("--data", "a datalist in JSON", f"{file} ({error})")
    if not isinstance(content, dict):
        fail("--data", "a datalist with sections", f"a {type(content).__name__} in {file}")
    return content


def _has_no_label(entry: object) -> bool:
    return isinstance(entry, str) or (isinstance(entry, dict) and "label" not in entry)


def _wrong(where: str, entry: object) -> str | None:
    """What is wrong with an entry that does not name its files."""
    wanted = f'{where}: expected {{"image": file, "label": file}}, got'
    if not isinstance(entry, dict):
        return f"{wanted} {entry!r:.60}"
    for key in ("image", "label"):
        held = entry.get(key)
        several = key == "image" and isinstance(held, list) and held
        if not all(isinstance(name, str) and name for name in (held if several else [held])):
            return f"{wanted} {held!r:.60} for {key!r}"
    if entry["image"] == entry["label"]:
        return f"{wanted} {entry['image']} for both"
    return None


def listed_images(file: Path, section: str = "test") -> list[Entry]:
    """The images of a section, whose entries may be files or have "image"; labels are left out."""
    entries = _read(file).get(section)
    if not isinstance(entries, list) or not entries:
        fail("--images", f"a list of volumes under {section!r} in {file}", f"{entries!r:.60}")
    images: list[Entry] = []
    for number, entry in enumerate(entries):
        held = entry.get("image") if isinstance(entry, dict) else entry
        listed = held if isinstance(held, list) and held else [held]
        if not all(isinstance(name, str) and name for name in listed):
            fail("--images", f"a file in {section}[{number}] of {file}", f"{held!r:.60}")
        images.append(_resolved(file.parent, {"image": held}))
    return images


def _resolved(folder: Path, entry: Entry) -> Entry:
    """The files of an entry, from a folder on; whatever else the entry has is left out."""

    def resolve(held: Any) -> Any:
        return [resolve(one) for one in held] if isinstance(held, list) else str(folder / held)

    return {key: resolve(entry[key]) for key in ("image", "label") if key in entry}
