"""The methods that are compared, by their names.

A method makes a model adaptable and says what is trained; see `base.Method`. Methods whose numbers
are few, or act on scaled factors, have larger rates.
"""

from __future__ import annotations

from functools import partial

from . import by_peft, ours, plain, small
from .base import Method

PEFT = "peft"
OURS = "tcur_kernels"


def _by_peft(label: str, config: by_peft.Config, rate: float = 1e-3) -> Method:
    """A method that is a configuration of peft."""
    return Method(label, PEFT, partial(by_peft.prepare, config=config), rate)


_LORA_1 = partial(by_peft.lora, rank=1)
_PISSA = partial(by_peft.lora, start="pissa_niter_4")
_PUBLISHED = partial(ours.tcurlora, rank=8, basis="slices")

METHODS: dict[str, Method] = {
    "head": Method("head alone", "torch", plain.head),
    "full": Method("all parameters", "torch", plain.full, rate=1e-4),
    "lora:1": _by_peft("LoRA, r = 1", _LORA_1),
    "lora:8": _by_peft("LoRA, r = 8", by_peft.lora),
    "adalora": Method("AdaLoRA, r = 12 to 8", PEFT, by_peft.adalora),
    "pissa": _by_peft("PiSSA, r = 8", _PISSA),
    "vera": _by_peft("VeRA, r = 64", by_peft.vera, rate=1e-2),
    "fourierft": _by_peft("FourierFT, n = 1000", by_peft.fourierft, rate=1e-2),
    "tinylora": _by_peft("TinyLoRA, u = 64", by_peft.tinylora, rate=1e-2),
    "psoft": _by_peft("PSOFT, r = 32", by_peft.psoft),
    "road": _by_peft("RoAd", by_peft.road, rate=3e-3),
    "miss": _by_peft("MiSS, r = 8", by_peft.miss),
    "adapter": Method("Adapter, width 32", "Houlsby et al. (2019)", small.adapter),
    "ssf": Method("SSF", "Lian et al. (2022)", small.ssf, rate=3e-3),
    "lotr": Method("LoTR, r = 8", "Bershatsky et al. (2024)", small.lotr),
    "curlora": Method("CURLoRA, r = 8", OURS, ours.curlora, rate=1e-2),
    "tcurlora:published": Method("tCURLoRA as published, r = 8", OURS, _PUBLISHED),
    "tcurlora:8": Method("tCURLoRA, r = 8", OURS, ours.tcurlora),
    "tcurlora:32": Method("tCURLoRA, r = 32", OURS, partial(ours.tcurlora, rank=32)),
}

#: The methods of the first table and of the curves. Training sets of other sizes than that of the
#: search are for these alone, unless the methods are named.
FEW = ("head", "tcurlora:8", "tcurlora:32", "lora:1", "lora:8", "full")


def method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
