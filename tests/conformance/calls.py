"""The one way in which the suite calls an operator: by keywords, bound by the registered schema."""

import torch

from tcur_kernels.operators import contract


def schema(name, language):
    """The registered schema of ``tcur::name`` in a language."""
    return contract.operator(name, language)._schema


def bound(name, language, given):
    """Positional and keyword-only arguments; nothing may be unknown, and nothing be left out."""
    arguments = schema(name, language).arguments
    unknown = set(given) - {argument.name for argument in arguments}
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if unknown or missing:
        raise TypeError(f"{name}: unknown arguments {sorted(unknown)}, missing {missing}")
    args = [given.get(a.name, a.default_value) for a in arguments if not a.kwarg_only]
    return args, {a.name: given[a.name] for a in arguments if a.kwarg_only}


def call(name, language, /, **given):
    """What ``tcur::name`` of a language makes of these arguments."""
    args, keywords = bound(name, language, given)
    return contract.operator(name, language)(*args, **keywords)


def prepared(name, language, of, /, **given):
    """A function of the arguments that ``of`` names, which a graph sees as the operator alone."""
    args, keywords = bound(name, language, given)
    names = [argument.name for argument in schema(name, language).arguments]
    places, operator = [names.index(each) for each in of], contract.operator(name, language)

    def run(*values):
        now = [*args]
        for place, value in zip(places, values, strict=True):
            now[place] = value
        return operator(*now, **keywords)

    return run


def plain(name, /, **given):
    """The same by functions of torch alone, which torch's own autograd differentiates."""
    args, keywords = bound(name, "reference", given)
    return contract.plain(name)(*args, **keywords)


def opcheck(name, language, /, **given):
    """Schema, fake, autograd registration and traced behaviour, as torch itself checks them."""
    torch.library.opcheck(contract.operator(name, language), *bound(name, language, given))
