"""All mutants of the kernels in one compilation: a copy of `csrc` that holds every one of them.

A mutant is a row of a table (`cpu`, `cuda`): what is changed, in words; the text where that is,
with the changed part between « and »; and what stands there instead. In the copy an expression
becomes ``(TCUR_IS(17) ? (new) : (old))``, and a statement, which ends with a semicolon, becomes
``if (TCUR_IS(17)) { new } else { old }``. The number of the mutant that is in force is a global
variable of the library, so that thousands of lines are compiled once and not once for each mutant.
"""

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ROOT / "csrc"

#: In the copy alone. Constants are computed as they were: no mutant is in force at compile time.
HEADER = """#pragma once
extern "C" __attribute__((visibility("default"))) int tcur_mutant;
#define TCUR_IS(number) (!__builtin_is_constant_evaluated() && tcur_mutant == number)
"""
DEFINITION = 'extern "C" __attribute__((visibility("default"))) int tcur_mutant = 0;\n'


@dataclass(frozen=True)
class Mutant:
    """One way in which a kernel is broken.

    Attributes:
        file: below `csrc`.
        words: what is wrong then.
        where: text that occurs once in the file, with the part that is changed between « and ».
        new: what stands in place of that part.
    """

    file: str
    words: str
    where: str
    new: str

    @property
    def old(self):
        return self.where.partition("«")[2].partition("»")[0]

    @property
    def is_statement(self):
        return self.old.endswith(";")

    def span(self, text):
        """Where the changed part is in the text of its file; ValueError if it does not fit."""
        before, _, rest = self.where.partition("«")
        old, _, after = rest.partition("»")
        count = text.count(before + old + after)
        if count != 1 or not old:
            raise ValueError(f"{self.file}: {self.words}: {self.where!r} occurs {count} times")
        begin = text.index(before + old + after) + len(before)
        return begin, begin + len(old)

    def choice(self, number, old):
        """The text with both: as it was, and as it is when this mutant is in force."""
        if self.is_statement:
            return f"if (TCUR_IS({number})) {{ {self.new} }} else {{ {old} }}"
        return f"(TCUR_IS({number}) ? ({self.new}) : ({old}))"


def rows(file, *each):
    """Mutants of one file, of triples (words, where, new)."""
    return [Mutant(file, *one) for one in each]


def numbered(kernels):
    """Mutants of a table of kernels by their numbers, which begin with 1."""
    every = [mutant for kernel in kernels.values() for mutant in kernel]
    return dict(enumerate(every, 1))


def mutated(text, mutants):
    """The text of a file with all of its mutants: a dict of numbers and `Mutant`."""
    spans = [(*mutant.span(text), number) for number, mutant in mutants.items()]
    spans.sort(key=lambda one: (one[0], -one[1], one[2]))

    def render(begin, end, inside):
        made, at = "", begin
        while inside:
            first, last, number = inside[0]
            within = [one for one in inside[1:] if one[0] < last]
            for one in within:
                if one[1] > last:
                    raise ValueError(f"mutants {number} and {one[2]} overlap")
            old = render(first, last, within)
            made += text[at:first] + mutants[number].choice(number, old)
            at, inside = last, inside[1 + len(within) :]
        return made + text[at:end]

    return render(0, len(text), spans)


def copy_sources(kernels, folder):
    """Copies `csrc` into a folder, with all mutants of a table in it."""
    by_file = {}
    for number, mutant in numbered(kernels).items():
        by_file.setdefault(mutant.file, {})[number] = mutant
    for path in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        file, text = path.relative_to(SOURCES).as_posix(), path.read_text()
        if file in by_file:
            include = '#include "' + "../" * file.count("/") + 'common/mutant.h"\n'
            text = include + mutated(text, by_file[file])
        write(folder / file, text)
    write(folder / "common" / "mutant.h", HEADER)


def digest(folder):
    """What tells whether the sources in a folder are those of an earlier build."""
    made = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        made.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return made.hexdigest()


def write(path, text):
    """Writes a file unless it has that text: what did not change is not compiled again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Switch:
    """The number of the mutant that is in force in a library that is loaded."""

    def __init__(self, library):
        self._number = ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "tcur_mutant")

    def set(self, number):
        self._number.value = number
