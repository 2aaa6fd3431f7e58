"""The tables of mutants fit the sources, and every kernel has its own ten.

That the suite notices each of them is what `mutants/mutants.py` finds out, every night.
"""

import re

import pytest

from mutants import cpu, cuda, schemata
from mutants.schemata import SOURCES, Mutant

LANGUAGES = {"cpu": cpu, "cuda": cuda}
KERNELS = [(language, name) for language, each in LANGUAGES.items() for name in each.KERNELS]


@pytest.mark.parametrize("language", LANGUAGES)
def test_rows_fit_the_sources(language):
    """Each changes one place of its file, and two of them never half of the same text."""
    by_file = {}
    for number, mutant in schemata.numbered(LANGUAGES[language].KERNELS).items():
        assert mutant.new.strip(" ;") != mutant.old.strip(" ;"), mutant
        assert ";" not in mutant.old[:-1], f"several statements: {mutant}"
        by_file.setdefault(mutant.file, {})[number] = mutant
    for file, mutants in by_file.items():
        text = schemata.mutated((SOURCES / file).read_text(), mutants)
        assert [text.count(f"TCUR_IS({number})") for number in mutants] == [1] * len(mutants)


@pytest.mark.parametrize(("language", "name"), KERNELS)
def test_ten_mutants_for_each_kernel(language, name):
    """Each breaks it in its own way."""
    mutants = LANGUAGES[language].KERNELS[name]
    assert len({(each.file, each.where, each.new) for each in mutants}) >= 10


def files_of(language):
    """Sources and headers of a language, without those of instruction sets and the emulator."""
    folders = {"cpu": ("cpu", "common"), "cuda": ("cuda",)}[language]
    kinds = {".h", ".cpp", ".cu"}
    found = [path for folder in folders for path in (SOURCES / folder).iterdir()]
    return {str(path.relative_to(SOURCES)) for path in found if path.suffix in kinds}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_file_is_left_out(language):
    """A new file has mutants, or a reason why it needs none."""
    tables = LANGUAGES[language]
    broken = {each.file for mutants in tables.KERNELS.values() for each in mutants}
    assert broken | set(tables.NO_KERNEL) == files_of(language)
    assert not broken & set(tables.NO_KERNEL)


def test_no_kernel_is_left_out():
    """Those that a GPU launches, and those that are compiled for every instruction set."""
    texts = [path.read_text() for path in (SOURCES / "cuda").iterdir() if path.is_file()]
    launched = {
        name for text in texts for name in re.findall(r"^TCUR_KERNEL\(.+\)\s+(\w+)\(", text, re.M)
    }
    assert len(launched) >= 15
    assert launched <= set(cuda.KERNELS)
    declared = (SOURCES / "cpu" / "compiled_kernels.h").read_text()
    compiled = set(re.findall(r"^TCUR_TARGET \w+ (\w+)\(", declared, re.M))
    compiled = {name for name in compiled if not name.endswith("_scratch")}
    assert set(cpu.FUNCTIONS) == compiled
    assert set(cpu.FUNCTIONS.values()) <= set(cpu.KERNELS)


def test_all_mutants_stand_in_one_text():
    """Beside each other, within each other, and instead of the same text."""
    text = "a = b + c;\nd = e;\n"
    rows = [
        Mutant("", "", "a = «b + c»;", "b"),
        Mutant("", "", "b + «c»", "x"),
        Mutant("", "", "a = «b + c»;", "c"),
        Mutant("", "", "«d = e;»", "d = f;"),
    ]
    assert schemata.mutated(text, dict(enumerate(rows, 1))) == (
        "a = (TCUR_IS(1) ? (b) : ((TCUR_IS(3) ? (c) : (b + (TCUR_IS(2) ? (x) : (c))))));\n"
        "if (TCUR_IS(4)) { d = f; } else { d = e; }\n"
    )
    for where, message in (("«b» + d", "occurs 0 times"), ("«» = ", "occurs 2 times")):
        with pytest.raises(ValueError, match=message):
            Mutant("", "", where, "").span(text)
    halves = {1: Mutant("", "", "a = «b + c;\nd» =", "x"), 2: Mutant("", "", "«d = e»;", "y")}
    with pytest.raises(ValueError, match="overlap"):
        schemata.mutated(text, halves)
