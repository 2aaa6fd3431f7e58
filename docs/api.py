"""Writes docs/api.md from the docstrings of what is public: ``python docs/api.py``.

Public is what ``__all__`` lists in `tcur_kernels`, `tcur_kernels.decompose` and
`tcur_kernels.peft`. Everything else is private and may change from version to version.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

from tcur_kernels.files.whole import replacing

PAGE = Path(__file__).with_name("api.md")
PACKAGE = Path(__file__).parent.parent / "tcur_kernels"

HEAD = """# Everything public

Written by `python docs/api.py` from the docstrings; do not edit it by hand. What is not listed here
is private and may change from one version to the next. A public name that is to go warns first, see
[versions.md](versions.md).
"""

#: Module -> what it is for.
MODULES = {
    "tcur_kernels": "Adapters, operators and tubal algebra. `import tcur_kernels as tcur`.",
    "tcur_kernels.decompose": "Rules that choose slices, and stacks that are read block by block.",
    "tcur_kernels.peft": "The method for Hugging Face peft: `get_peft_model(model, TCURConfig())`.",
}


def page() -> str:
    """The text of the page."""
    parts = [HEAD]
    described: set[int] = set()
    for name, purpose in MODULES.items():
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{purpose}\n")
        for public in module.__all__:
            value = getattr(module, public)
            if id(value) not in described:
                described.add(id(value))
                parts.append(entry(public, value))
    return "\n".join(parts)


def entry(name: str, value: Any) -> str:
    """One public name: its signature, its docstring, and of a class what can be called on it."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"### {name}\n\n{kind_of(name, value)}\n"
    lines = [f"### {name}\n", "```", signature(name, value), "```\n", text(value)]
    for key, member in members(value) if inspect.isclass(value) else ():
        what = f"- `{key}`: {first_paragraph(member)}"
        lines += textwrap.wrap(what, 99, subsequent_indent="  ", break_long_words=False)
    return "\n".join(lines).rstrip() + "\n"


def kind_of(name: str, value: Any) -> str:
    """What is said of a value that is neither a class nor a function."""
    if isinstance(value, dict | tuple):
        return ", ".join(f"`{key}`" for key in value)
    for file in sorted(PACKAGE.rglob("*.py")):  # a type: the comment above it
        lines = file.read_text(encoding="utf-8").splitlines()
        for index, line in enumerate(lines):
            if line.startswith(f"{name} = "):
                return lines[index - 1].removeprefix("#: ")
    raise ValueError(f"nothing is said of {name}")


def signature(name: str, value: Any) -> str:
    """The call, an argument a line if it is long."""
    if inspect.isclass(value):
        maker = next(kind for kind in value.__mro__ if "__init__" in vars(kind))
        is_ours = maker.__module__.startswith("tcur_kernels")
        if not is_ours or any(kind.__module__.startswith("peft") for kind in value.__mro__):
            return f"{name}(...)"
    found = inspect.signature(value)
    parts = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        parts.append(f"{parameter.name}: {parameter.annotation}{default}")
    returns = "" if inspect.isclass(value) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= 96:
        return line
    inner = "".join(f"    {part},\n" for part in parts)
    return f"{name}(\n{inner}){returns}"


def members(value: type) -> list[tuple[str, Any]]:
    """Methods and properties of ours, in the order in which they are written."""
    found: dict[str, Any] = {}
    for kind in reversed(inspect.getmro(value)):
        if kind.__module__.startswith("tcur_kernels"):
            for key, member in vars(kind).items():
                is_member = isinstance(member, property | classmethod | staticmethod)
                if (is_member or inspect.isfunction(member)) and not key.startswith("_"):
                    found[key] = getattr(member, "__func__", member)
    return [(key, member) for key, member in found.items() if member.__doc__]


def text(value: Any) -> str:
    """A docstring as text that Markdown leaves as it is."""
    doc = inspect.cleandoc(value.__doc__ or "").replace("``", "`")
    head, *sections = doc.split("\n\n")
    parts = [head]
    for section in sections:
        title, _, body = section.partition("\n")
        if title.endswith(":") and title[:-1] in ("Args", "Attributes", "Returns", "Raises"):
            parts.append(f"{title}\n\n{textwrap.indent(textwrap.dedent(body), '    ')}")
        else:
            parts.append(section)
    return "\n\n".join(parts) + "\n"


def first_paragraph(value: Any) -> str:
    """The first paragraph of a docstring, in one line."""
    doc = inspect.cleandoc(value.__doc__ or "").replace("``", "`")
    return " ".join(doc.split("\n\n")[0].split())


if __name__ == "__main__":
    with replacing(PAGE) as fresh:
        fresh.write_text(page(), encoding="utf-8")
