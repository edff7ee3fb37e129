"""Forward passes as CUDA graphs: when to capture one, how to capture and replay it, and which to keep.

A forward pass is some hundreds of kernels. For a small batch they run faster than the host can launch them one by one,
and the launches hold the GIL; a graph is launched as a whole. A graph has fixed shapes and fixed addresses: batches are
padded to a few sizes, and inputs and outputs are copied.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dinov3_server.backbone.runners.base import TORCH_DTYPES, finite_rows
from dinov3_server.backbone.runners.postprocessing import Postprocessing
from dinov3_server.models.interface import Output, OutputSpec, PixelShape
from dinov3_server.nn.model import Model

# Capture a key at its third use: most keys that are used once or twice are never used again.
CAPTURE_AT = 3
# With more tokens the kernels take longer than their launches, and a graph would hold much memory.
MAX_TOKENS = 1 << 15
MAX_GRAPHS = 128
# Keys whose uses are counted. Callers choose image sizes, so the number of keys is unlimited.
MAX_KEYS = 1024


def padded(images: int) -> int:
    """Return the batch size that `images` are padded to, less than an eighth larger.

    Every size up to 16, then eight sizes per power of two (18, 20, ... 32, 36, ... 64, 72, ...).
    """
    step = 1 << max(0, (images - 1).bit_length() - 4)
    return -(-images // step) * step


class GraphKey(NamedTuple):
    """Identity of a graph: pixel shape, padded batch size, and every output that any row asks for."""

    shape: PixelShape
    images: int
    outputs: tuple[OutputSpec, ...]


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """Result of a forward pass of n rows.

    `buffers[i]` are the output buffers of output i, contiguous [n, ...] tensors in their dtypes. `finite` [n, outputs]
    bool says whether all values of a row's output are finite.
    """

    buffers: list[list[Tensor]]
    finite: Tensor


def compute(
    model: Model,
    pixels: Tensor,
    outputs: Sequence[OutputSpec],
    postprocessing: Callable[[Mapping[Output, Tensor]], Postprocessing],
) -> ForwardResult:
    """Run model and postprocessing on the current stream. Never waits for the device."""
    made = postprocessing(model(pixels, dict.fromkeys(spec.output for spec in outputs)))
    buffers = [
        [
            buffer.to(TORCH_DTYPES[dtype]).contiguous()
            for buffer, dtype in zip(made.buffers(spec), spec.buffer_dtypes, strict=True)
        ]
        for spec in outputs
    ]
    finite = [
        finite_rows([*of_output, *made.before_pooling(spec)]) for spec, of_output in zip(outputs, buffers, strict=True)
    ]
    return ForwardResult(buffers, torch.stack(finite, dim=1))


class ForwardGraph:
    """A captured forward pass, with its pixels and features at fixed addresses.

    All graphs of a device must be captured and replayed on one stream: they share one memory pool, so a replay
    overwrites the others' intermediate tensors and features.
    """

    def __init__(
        self, forward: Callable[[Tensor], ForwardResult], pixels: Tensor, cached: Sequence[Tensor], pool: object
    ) -> None:
        """Capture `forward` of tensors like `pixels`, on the current stream.

        It must have run before, on this thread and stream and with this shape: that loads libraries and kernels, which
        a capture cannot do. `cached` are the model's cached tensors (`Model.cached_tensors`); the graph keeps them
        alive. `pool` is another graph's memory pool, None for the first. Raises torch.OutOfMemoryError, or RuntimeError
        if the capture fails. Unlike torch.cuda.graph, does not wait for the device.
        """
        self._cached = tuple(cached)
        self._pixels = torch.empty_like(pixels)
        self._graph = torch.cuda.CUDAGraph()
        # In this mode other threads may wait for events during the capture.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            self._result = forward(self._pixels)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # end the capture; the first error is the one to report
                self._graph.capture_end()
            raise
        self._graph.capture_end()

    @property
    def pool(self) -> object:
        return self._graph.pool()

    @property
    def nbytes(self) -> int:
        """Device memory that only this graph uses."""
        return sum(t.nbytes for t in (self._pixels, self._result.finite, *chain(*self._result.buffers)))

    def replay(self, pixels: Tensor, count: int) -> ForwardResult:
        """Return the features of the first `count` rows of `pixels`, copied to new memory, on the current stream.

        Only these copies access the fixed addresses. So the next replay need not wait for copies between host and
        device, and overwrites nothing that they still use.
        """
        self._pixels[:count].copy_(pixels[:count])
        self._graph.replay()
        return ForwardResult(
            [[buffer[:count].clone() for buffer in of_output] for of_output in self._result.buffers],
            self._result.finite[:count].clone(),
        )


@dataclass(slots=True)
class _Entry:
    uses: int = 0
    graph: ForwardGraph | None = None
    refused: bool = False


class GraphCache:
    """An LRU cache of a device's graphs, with use counts of keys to decide what to capture.

    `max_bytes` bounds the memory that graphs hold individually. Their shared pool is as large as the largest graph
    needs.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._captures = True
        self._entries: OrderedDict[GraphKey, _Entry] = OrderedDict()  # least recently used first

    def find(self, key: GraphKey) -> ForwardGraph | None:
        """Count a use of `key`, and return its graph if it has one."""
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        entry.uses += 1
        if len(self._entries) > MAX_KEYS:
            self._entries.popitem(last=False)
        return entry.graph

    def is_due(self, key: GraphKey, tokens: int) -> bool:
        """Return whether to capture `key`, the key used last, with `tokens` per image."""
        entry = self._entries[key]
        return (
            self._captures
            and entry.uses >= CAPTURE_AT
            and entry.graph is None
            and not entry.refused
            and key.images * tokens <= MAX_TOKENS
        )

    def refuse(self, key: GraphKey) -> None:
        """Do not capture this key while it is remembered."""
        self._entries[key].refused = True

    def stop(self) -> None:
        """Capture no further graphs, and keep the existing ones."""
        self._captures = False

    def keep(self, key: GraphKey, graph: ForwardGraph) -> None:
        """Store `graph` for `key`, the key used last, and drop the least recently used graphs over the limits."""
        if graph.nbytes > self._max_bytes:
            self.refuse(key)
            return
        self._entries[key].graph = graph
        graphs = [(other, entry.graph) for other, entry in self._entries.items() if entry.graph is not None]
        nbytes = sum(kept.nbytes for _, kept in graphs)
        while len(graphs) > MAX_GRAPHS or nbytes > self._max_bytes:
            oldest, dropped = graphs.pop(0)
            nbytes -= dropped.nbytes
            del self._entries[oldest]

    def pool(self) -> object:
        """Return the memory pool that the graphs share, None without graphs: it is freed with the last of them."""
        return next((entry.graph.pool for entry in self._entries.values() if entry.graph is not None), None)

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return sum(entry.graph is not None for entry in self._entries.values())
