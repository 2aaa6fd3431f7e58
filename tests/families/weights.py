"""Random weights of a size that keeps signals alive."""

import torch
from torch import nn


def randomise(model, seed):
    """Randomises all weights at such a size, also those that start as zeros or uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    done = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done or not parameter.is_floating_point():
                    continue
                done.add(id(parameter))
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                if _is_matrix(module, name, parameter):
                    fan_in = parameter[0].numel()
                    parameter.copy_(noise / fan_in**0.5)
                elif not torch.isfinite(parameter).all():
                    parameter.copy_(0.1 * noise)
                elif parameter.dim() == 1:
                    parameter.add_(0.1 * noise)
                else:
                    parameter.copy_(parameter + 0.02 * noise)
    return model


def _is_matrix(module, name, parameter):
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding | nn.MultiheadAttention
    known = isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    return known and parameter.dim() >= 2 and name.endswith("weight")
