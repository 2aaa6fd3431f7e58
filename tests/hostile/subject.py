"""What a subject of damage is, and the model that files are made of.

A subject has a folder of whole files. Its ``effect`` reads a folder through the package, and tells
all that comes out of it, so that two effects are equal only if the files mean the same.
"""

import contextlib
import copy
import io

import torch
from torch import nn

import tcur_kernels as tcur
from tcur_kernels import cli
from tcur_kernels.adapters.sealing import sealed


class Net(nn.Module):
    """Two stacks, a head, a bias and statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.down = nn.ModuleList([nn.Linear(8, 4, bias=False) for _ in range(2)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(self.down[0](x) + self.down[1](x)))


def base():
    torch.manual_seed(0)
    return Net().eval()


BASE = base()
NAMES = {*(f"layers.{i}" for i in range(3)), "down.0", "down.1"}
X = torch.linspace(-1, 1, 40).view(5, 8)


def fresh():
    return copy.deepcopy(BASE)


def trained(train_also=(), seed=1):
    model = fresh()
    adapter = tcur.adapt(model, rank=2, targets=["layers.*", "down.*"], train_also=train_also)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        if train_also:
            model.norm.running_mean.add_(0.1)
    adapter.metadata = {"spacing": [1.5, 1.5, 2.0], "of": {"classes": 3, "name": "naïve"}}
    return adapter


def bits(tensor):
    numbers = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), numbers


@torch.no_grad()
def computed(model):
    """All that a model is: its output, and every number of its state."""
    state = {name: bits(tensor) for name, tensor in model.state_dict().items() if tensor.numel()}
    return bits(model(X)), state


class Refused(Exception):
    """The command line said so."""


def command(*arguments):
    """The output of a command; raises what it said if it refused."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(argument) for argument in arguments])
    if code:
        raise Refused(err.getvalue().rpartition("error: ")[2].strip())
    return out.getvalue()


def listing(folder):
    """Every file below a folder with its bytes."""
    if not folder.is_dir():
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def seal(fields):
    """The metadata of a file with digests that are right again; as they are without digests."""
    return sealed({name: text for name, text in fields.items() if isinstance(text, str)})


class Subject:
    """Files, and their damage. ``argument`` is what errors call them."""

    name = ""
    arguments = ("path",)
    #: Whether the numbers in the files are protected by a digest.
    is_sealed = False

    def make(self, folder):
        raise NotImplementedError

    def damage(self, folder, rng, outside):
        """Damages the files; returns what was done, and whether any result is right."""
        raise NotImplementedError

    def readers(self):
        """Name -> a function of the folder."""
        raise NotImplementedError


def rewrite(path, data):
    path.write_bytes(data)
