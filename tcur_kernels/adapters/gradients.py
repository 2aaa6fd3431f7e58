"""Gradients of a loss with respect to the weights of linear layers, from a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..decompose import HeldSlices
from ..files.tensor_file import TensorFile
from ..matrices import matrix_of
from .install import is_adapted
from .linear_maps import find_weights, reasons_to_leave_out
from .plan import StackPlan
from .targets import Targets, choose

#: Name of a layer -> gradient ``[out, in]``; or a safetensors file with these.
Gradients = Mapping[str, Tensor] | str | Path

#: ``loss_fn(model, batch)`` -> a scalar loss.
LossFn = Callable[[nn.Module, Any], Tensor]


def collect_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    targets: Targets = None,
) -> dict[str, Tensor]:
    """The gradient of the loss with respect to every weight, averaged over some batches.

    `Budget` uses it to share out trained numbers among the stacks. The model stays as it is, its
    own gradients included. To keep the result, use ``safetensors.torch.save_file``.

    Args:
        model: a base model that is not adapted, in the mode (train or eval) that you want.
        batches: batches of your task; a few are enough, such as ten.
        loss_fn: ``loss_fn(model, batch)`` gives the loss of a batch. By default a batch is a
            mapping, and the loss is ``model(**batch).loss``, as transformers models have it.
        targets: which layers, see `adapt`.

    Returns:
        Name of the layer -> ``[out, in]`` in fp32 (fp64 for fp64 weights), on the CPU. It takes as
        much memory as these weights. Layers that the loss does not use have zeros.

    Raises:
        TypeError: a loss is not a tensor; or there is no ``loss_fn`` and a batch is not a mapping,
            or the model gives no loss.
        ValueError: there are no batches, a loss has several elements or does not depend on the
            weights, a gradient is not finite, or the model is adapted already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    if is_adapted(model):
        raise ValueError("model: expected a base model, got one that is adapted already")
    weights = find_weights(model)
    reasons = reasons_to_leave_out(model, weights, set())
    chosen, _ = choose(model, weights, reasons, targets)
    names = [n for group in chosen.values() for n in group] if isinstance(chosen, dict) else chosen
    taken = {name: weights[name] for name in names if name not in reasons}
    for name, weight in taken.items():
        if weight.place.quantiser is not None:
            raise ValueError(
                f"model: expected weights that take a gradient, got {name}, which is quantised; "
                "collect the gradients of the model in full precision, whose layers have the same "
                "names"
            )
    parameters = {name: weight.stored()[0] for name, weight in taken.items()}
    sums = _summed(model, {*parameters.values()}, batches, loss_fn or _own_loss)
    found = {}
    for name, weight in taken.items():
        _, layout, first = weight.stored()
        whole = sums[parameters[name]]
        logical = matrix_of(whole, layout)
        found[name] = logical[first : first + weight.place.out_features].contiguous()
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"batches: expected finite gradients, got NaN or Inf in {name}")
    return found


def _summed(
    model: nn.Module, names: set[str], batches: Iterable[Any], loss_fn: LossFn
) -> dict[str, Tensor]:
    """The mean gradients of parameters; the model has its own gradients and flags afterwards."""
    every = dict(model.named_parameters())
    flags = {name: parameter.requires_grad for name, parameter in every.items()}
    own = {name: every[name].grad for name in names}
    sums = {
        name: torch.zeros(
            every[name].shape,
            dtype=torch.promote_types(every[name].dtype, torch.float32),
            device="cpu",
        )
        for name in names
    }

    def gather(name: str) -> Callable[[Tensor], None]:
        # Taken away as soon as it is there, so that only one gradient is on the device at a time.
        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sums[name] += parameter.grad.to(sums[name])
            parameter.grad = None

        return take

    try:
        every_batch = iter(batches)
    except TypeError:
        raise TypeError(
            f"batches: expected some that can be iterated over, got {type(batches).__name__}"
        ) from None
    hooks, count = [], 0
    try:
        for name, parameter in every.items():
            parameter.requires_grad = name in names
        for name in names:
            every[name].grad = None
            hooks.append(every[name].register_post_accumulate_grad_hook(gather(name)))
        for batch in every_batch:
            with torch.enable_grad():
                _checked(loss_fn(model, batch)).backward()
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in every.items():
            parameter.requires_grad = flags[name]
        for name, grad in own.items():
            every[name].grad = grad
    if count == 0:
        raise ValueError("batches: expected at least one, got none")
    return {name: total / count for name, total in sums.items()}


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches: expected mappings of arguments where loss_fn is None, got "
            f"{type(batch).__name__}"
        )
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise TypeError(
            "loss_fn: expected a function, since the model gives no loss for a batch, got None"
        )
    return loss


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected it to return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn: expected one number, got {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss_fn: expected a loss that depends on the weights, got one without")
    return loss.reshape(())


def read_gradients(gradients: Gradients) -> Mapping[str, Tensor]:
    """The gradients themselves, which may be in a file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: these are not gradients.
    """
    if isinstance(gradients, str | Path):
        with TensorFile(Path(gradients), "gradients") as file:
            found = {name: file.read(name) for name in file.entries}
            file.check_unchanged()
        for name, gradient in found.items():
            if not gradient.dtype.is_floating_point:
                raise TypeError(
                    f"gradients: expected floating tensors, got {gradient.dtype} in {name} at "
                    f"{gradients}"
                )
        return found
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients: expected those of collect_gradients, or their file, got "
            f"{type(gradients).__name__}"
        )
    return gradients


def gradient_of(
    stack: StackPlan, gradients: Mapping[str, Tensor], max_workspace: int, progress: bool
) -> HeldSlices:
    """The gradient of the weights of one stack, as slices.

    Raises:
        TypeError, ValueError: the gradient of a layer is missing, has another shape or is not
            finite; or those of the stack are all zero.
    """
    parts = []
    for member in stack.members:
        found, expected = gradients.get(member.module), [member.slices * stack.n1, stack.n2]
        if found is None:
            raise ValueError(
                f"gradients: expected one for {member.module} of stack {stack.name}, got none"
            )
        if not isinstance(found, Tensor) or not found.dtype.is_floating_point:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"gradients: expected a floating tensor for {member.module}, got {kind}"
            )
        if list(found.shape) != expected:
            raise ValueError(
                f"gradients: expected {expected} (out, in) for {member.module}, got "
                f"{list(found.shape)}"
            )
        if not torch.isfinite(found).all():
            raise ValueError(
                f"gradients: expected finite numbers for {member.module}, got NaN or Inf"
            )
        parts.append(found)
    if not any(bool(part.any()) for part in parts):
        raise ValueError(
            f"gradients: expected some that are not zero in stack {stack.name}, got zeros"
        )
    return HeldSlices("gradients", parts, stack.n1, max_workspace, progress)
