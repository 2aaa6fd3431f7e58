"""Adapted models as plain torch computes them: what `assert_composition_close` compares with.

Every adapted weight is W + alpha * C * U * R, by `torch.fft` from the base weight, the indices and
a core that is a leaf, so there are gradients of the cores too. In float64 that is ``exact``.
"""

import torch
from torch.func import functional_call


class Plain:
    """A copy of an adapter's model at one dtype, in which nothing of the package computes.

    Attributes:
        cores: the cores by the names of their stacks, leaves that ask for gradients.
    """

    def __init__(self, adapter, dtype=torch.float32):
        self.dtype = dtype
        self._model = adapter.merge(inplace=False).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self._stacks, self.cores = [], {}
        for entry in adapter.plan.stacks:
            stack = adapter.stacks[entry.name]
            base = torch.stack(stack.base_slices()).detach().to(wide)
            core = stack.core.detach().to(wide, copy=True).requires_grad_()
            self.cores[entry.name] = core
            self._stacks.append((entry, stack, base, core))

    def __call__(self, *args, **kwargs):
        parameters = dict(self._model.named_parameters())
        for entry, stack, base, core in self._stacks:
            update = product(base[:, :, list(stack.columns)], core, base[:, list(stack.rows)])
            w_eff = (base + stack.alpha * update).to(self.dtype)
            first = 0
            for member in entry.members:
                own = w_eff[first : first + member.slices].flatten(0, 1)
                first += member.slices
                write_weight(parameters, member.module, own)
        return functional_call(self._model, parameters, args, kwargs)

    def with_gradients(self, loss, *args):
        """The output, and the gradients of its ``loss`` in all cores, by their order."""
        y = self(*args)
        return (y, *torch.autograd.grad(loss(y), list(self.cores.values())))


def product(lateral, core, horizontal):
    """C * U * R by the half spectra."""
    spectra = [torch.fft.rfft(t, dim=0) for t in (lateral, core, horizontal)]
    return torch.fft.irfft(spectra[0] @ spectra[1] @ spectra[2], n=core.shape[0], dim=0)


def write_weight(parameters, name, weight):
    """Sets the weight [n_out, n_in] of the layer ``name``, wherever its model keeps it."""
    owner, _, projection = name.rpartition(".")
    fused = f"{owner}.in_proj_weight"
    if f"{name}.weight" in parameters:
        stored = parameters[f"{name}.weight"]
        # A square Conv1D would not tell; those of the tests are told by name.
        parameters[f"{name}.weight"] = weight.T if ".c_" in name else weight
        assert parameters[f"{name}.weight"].shape == stored.shape
    elif fused in parameters:
        blocks = list(parameters[fused].chunk(3))
        blocks["qkv".index(projection[0])] = weight
        parameters[fused] = torch.cat(blocks)
    else:
        parameters[f"{name}_weight"] = weight
