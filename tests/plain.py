"""Adapted models in plain torch, for comparison in `assert_composition_close`.

Every adapted weight is W + scale * C * U * R. It is computed with `torch.fft` from the base
weight, the indices, the name of the basis and a core that is a leaf, so the cores get gradients,
too. In float64 the result is ``exact``.
"""

import copy

import torch
from torch.func import functional_call


def base_slices(stack):
    """The n3 present base weights ``[n1, n2]`` of a stack."""
    weights = [place.weight.detach() for place in stack.places]
    return [part for weight in weights for part in weight.split(stack.n1)]


class Plain:
    """A copy of an adapter's model in one dtype, computed without this package.

    Args:
        base: the model before it was adapted; by default the adapter's model with plain layers.

    Attributes:
        cores: the cores by the names of their stacks, as leaves that require grad.
        trained: all that the adapter trains, in its order: the cores, then the rest.
    """

    def __init__(self, adapter, dtype=torch.float32, base=None):
        self.dtype = dtype
        model = adapter.merge(inplace=False) if base is None else copy.deepcopy(base)
        self._model = model.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self._stacks, self.cores = [], {}
        for entry in adapter.plan.stacks:
            stack = adapter.stacks[entry.name]
            slices = torch.stack(base_slices(stack)).to(wide)
            core = stack.core.detach().to(wide, copy=True).requires_grad_()
            self.cores[entry.name] = core
            self._stacks.append((entry, stack, slices, core))
        own = dict(self._model.named_parameters())
        beside = [own[name] for name, _ in adapter.named_parameters() if name in own]
        self.trained = [*self.cores.values(), *beside]

    def __call__(self, *args, **kwargs):
        return functional_call(self._model, self.parameters(), args, kwargs)

    def parameters(self):
        """The model's parameters by name, where adapted weights are W_eff."""
        parameters = dict(self._model.named_parameters())
        for entry, stack, slices, core in self._stacks:
            lateral, horizontal = sides_of(stack, slices)
            update = product(lateral, core, horizontal)
            w_eff = (slices + scale_of(stack) * update).to(self.dtype)
            first = 0
            for member in entry.members:
                own = w_eff[first : first + member.slices].flatten(0, 1)
                first += member.slices
                write_weight(parameters, member.module, own)
        return parameters

    def with_gradients(self, loss, *args):
        """The output, and the gradients of its ``loss`` for all that the adapter trains."""
        y = self(*args)
        return (y, *torch.autograd.grad(loss(y), self.trained))


def by_plain_torch(adapter, x):
    """``plain`` and ``exact`` of `assert_composition_close`, for the adapted model's output."""
    plain, exact = Plain(adapter, x.dtype), Plain(adapter, torch.float64)
    return lambda: plain(x), exact(x.double())


def scale_of(stack):
    """What C * U * R is multiplied by, from the settings and sizes of a stack."""
    if stack.basis == "slices":
        return stack.alpha
    return stack.alpha * (stack.n1 * stack.n2) ** 0.5 / (2 * stack.rank)


def sides_of(stack, slices):
    """C and R, made of the chosen ones of all ``slices`` and in their dtype."""
    lateral, horizontal = slices[:, :, list(stack.columns)], slices[:, list(stack.rows)]
    if stack.basis == "orthonormal":
        # In float64, and rounded once: what C and R are does not depend on the order of sums.
        columns, rows = isometric(lateral.double()), isometric(horizontal.double().mT)
        lateral, horizontal = columns.to(slices.dtype), rows.mT.to(slices.dtype)
    return lateral, horizontal


def isometric(slices):
    """Slices ``[n3, n, r]`` that span the same, orthonormal at every frequency.

    Each is what those before it leave of the given one, or zero where this is nothing.
    """
    given = torch.fft.rfft(slices, dim=0)
    found, norms = given[:, :, :0], slices.norm(dim=(0, 1))
    for index in range(slices.shape[2]):
        rest = given[:, :, index : index + 1]
        for _ in range(2):  # the second time for what rounding left
            rest = rest - found @ (found.mH @ rest)
        size = rest.norm(dim=1, keepdim=True)
        one = torch.where(size > 2**-20 * norms[index], rest / size, 0)
        found = torch.cat([found, one], 2)
    return torch.fft.irfft(found, n=slices.shape[0], dim=0)


@torch.no_grad()
def with_updates(base, model, adapters=None, change=lambda update: update):
    """A copy of ``base`` whose weights include the updates of a peft ``model``, by default all.

    ``change`` is applied to each update, in the layout of its weight, before it is added.
    """
    twin = copy.deepcopy(base)
    for name, layer in model.base_model.model.named_modules():
        for adapter, place in getattr(layer, "tcur_places", {}).items():
            if adapters is None or adapter in adapters:
                weight, stack = twin.get_submodule(name).weight, layer.tcur_stacks[adapter]
                wide = torch.promote_types(weight.dtype, torch.float32)
                factors = (stack.lateral, stack.core, stack.horizontal)
                update = stack.scale * product(*(t.detach().to(wide) for t in factors))
                own = update[place.slice_index : place.slice_index + place.slices].flatten(0, 1)
                own = change(place.in_layout(own))
                weight.copy_(weight.to(wide) + own)
    return twin


def product(lateral, core, horizontal):
    """C * U * R, computed with half spectra."""
    spectra = [torch.fft.rfft(t, dim=0) for t in (lateral, core, horizontal)]
    return torch.fft.irfft(spectra[0] @ spectra[1] @ spectra[2], n=core.shape[0], dim=0)


def write_weight(parameters, name, weight):
    """Sets the weight [n_out, n_in] of the layer ``name``, wherever its model stores it."""
    owner, _, projection = name.rpartition(".")
    fused = f"{owner}.in_proj_weight"
    if name in parameters:  # a matrix for each expert
        parameters[name] = weight.reshape(parameters[name].shape)
    elif f"{name}.weight" in parameters:
        stored = parameters[f"{name}.weight"]
        # The shape of a square Conv1D says nothing, so the tests' Conv1D are recognised by name.
        own = weight.T if ".c_" in name else weight
        parameters[f"{name}.weight"] = own.reshape(stored.shape) if stored.ndim > 2 else own
        assert parameters[f"{name}.weight"].shape == stored.shape
    elif fused in parameters:
        blocks = list(parameters[fused].chunk(3))
        blocks["qkv".index(projection[0])] = weight
        parameters[fused] = torch.cat(blocks)
    else:
        parameters[f"{name}_weight"] = weight
