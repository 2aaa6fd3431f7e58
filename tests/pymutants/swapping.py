"""Breaks a loaded module in place: functions that exist already get the code of another source.

A mutant is a source with one thing changed. Whoever imported a function of the module, or was
handed it at registration, holds the function itself. So its code is exchanged, and nothing is
imported anew. That takes milliseconds. It works for Triton's interpreter too, which reads the
source of a kernel from the file that its code names.

What runs at import alone (constants, defaults, decorators) cannot be broken this way.
`NotSwappable` says so, and such a mutant has to be imported in a process of its own (`fresh`).
"""

import contextlib
import dis
import gc
import linecache
import sys
import types

#: What a code object does, apart from the code objects within it.
PARTS = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_exceptiontable")
#: Instructions that stand for lines and for the size of what follows.
PADDING = ("NOP", "EXTENDED_ARG", "CACHE")
IS_FUNCTION = 0x02  # CO_NEWLOCALS: functions have it, bodies of modules and classes have not


class NotSwappable(Exception):
    """The change is in what runs when the module is imported."""


def _own(code):
    constants = [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return [getattr(code, part, None) for part in PARTS], constants


def _is_same_body(one, other):
    """Whether two bodies of modules or classes do the same, whatever lines they stand on."""
    if _own(one) == _own(other):
        return True
    pairs = []
    for code in (one, other):
        steps = [step for step in dis.get_instructions(code) if step.opname not in PADDING]
        is_code = [isinstance(step.argval, types.CodeType) for step in steps]
        pairs.append(
            [(s.opname, "" if c else s.argrepr) for s, c in zip(steps, is_code, strict=True)]
        )
    return pairs[0] == pairs[1]


def _named(step):
    return "" if isinstance(step.argval, types.CodeType) else step.argrepr


def _inner(code):
    return [each for each in code.co_consts if isinstance(each, types.CodeType)]


def changed(old, new):
    """Pairs of code objects of functions, where the second or what is within it does another thing.

    Raises:
        NotSwappable: the body of the module or of a class does another thing.
    """
    if len(_inner(old)) != len(_inner(new)):
        raise NotSwappable(old.co_name)
    pairs = [pair for each in zip(_inner(old), _inner(new), strict=True) for pair in changed(*each)]
    if old.co_flags & IS_FUNCTION:
        return [*pairs, (old, new)] if pairs or _own(old) != _own(new) else []
    if not _is_same_body(old, new):
        raise NotSwappable(old.co_name)
    return pairs


def _functions_of(code, path):
    """All functions that run this code; lambdas that are alike on one line are all of them."""
    return [
        each
        for each in gc.get_objects()
        if type(each) is types.FunctionType
        and each.__code__.co_filename == path
        and each.__code__ == code
    ]


def _exchange(function, code):
    function.__code__ = code
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is not None:  # which keeps what it made of a kernel's source
        interpreter.InterpretedFunction.rewritten_fn.pop(function, None)


def _compiled(path, text, into):
    old = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
    return old, compile(text, str(into), "exec", dont_inherit=True)


def is_swappable(path, text):
    """Whether functions alone do another thing.

    Raises:
        SyntaxError: the text is none of Python.
        LookupError: nothing does another thing.
    """
    try:
        pairs = changed(*_compiled(path, text, path))
    except NotSwappable:
        return False
    if not pairs:
        raise LookupError(f"{path.name}: the same code")
    return all(len(one.co_freevars) == len(other.co_freevars) for one, other in pairs)


@contextlib.contextmanager
def broken(path, text, into):
    """Within it, the functions of the module at ``path`` are those of the source ``text``.

    Args:
        path: file of a module that is loaded.
        text: the mutant.
        into: a file that is written; who looks for the source of a function finds it there.

    Raises:
        NotSwappable: see `changed`, and `is_swappable` asks first.
        LookupError: no function that exists would do another thing.
    """
    into.write_text(text, encoding="utf-8")
    linecache.checkcache(str(into))
    pairs = changed(*_compiled(path, text, into))
    found = [(function, *pair) for pair in pairs for function in _functions_of(pair[0], str(path))]
    if not found:
        raise LookupError(f"{path.name}: no function that exists is changed")
    functions = [function for function, _, _ in found]
    kept = [function.__code__ for function in functions]
    try:
        for function, _, other in found:
            _exchange(function, other)
        yield
    finally:
        for function, before in zip(functions, kept, strict=True):
            _exchange(function, before)
