"""Streams and captured graphs, as far as the package asks CUDA for them, for tensors on the CPU."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tcur_kernels.operators import streams


class FakeStreams:
    """The current stream and capture, to be set, and what was asked of streams."""

    def __init__(self, monkeypatch):
        self.stream, self.capture, self.log = 1, 0, []
        monkeypatch.setattr(streams, "are_used", lambda device: True)
        monkeypatch.setattr(streams, "capture_of", lambda device: self.capture)
        monkeypatch.setattr(streams, "current", lambda device: self.stream)
        for name in ("mark", "wait_for", "wait_for_stream"):
            monkeypatch.setattr(streams, name, getattr(self, name))

    def mark(self, device):
        return streams.Mark(self.stream, f"event of {self.stream}")

    def wait_for(self, mark, tensor):
        self.log.append(f"{self.stream} waits for {mark.event}")
        return self.stream

    def wait_for_stream(self, stream):
        self.log.append(f"{self.stream} waits for stream {stream}")

    @contextmanager
    def graph(self, graph):
        """As ``torch.cuda.graph``."""
        self.capture = id(graph)
        try:
            with graph:
                yield
        finally:
            self.capture = 0


class FakeGraph(TorchDispatchMode):
    """Records operators and runs them again on the same memory, as a replay does.

    No Python of what was recorded runs then, and no version is counted. Other than in a capture,
    operators run when they are recorded.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        def without_versions(tensor):
            return tensor.data

        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = func(*tree_map_only(torch.Tensor, without_versions, args), **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.data.copy_(new)
