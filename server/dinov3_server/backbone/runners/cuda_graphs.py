"""Forward passes as CUDA graphs: which are worth one, which are kept, and how one is captured and replayed.

A forward pass is some hundreds of kernels. Those of a small batch end sooner than the host launches them, and the
launches take the interpreter from whoever else needs it; a graph is launched whole. A graph has fixed shapes and fixed
addresses: batches are padded to a few sizes, and what goes in and out is copied.
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

from dinov3_server.backbone.model import Model
from dinov3_server.backbone.runners.base import TORCH_DTYPES, finite_rows
from dinov3_server.backbone.runners.postprocessing import Postprocessing
from dinov3_server.models.interface import Output, PixelShape, Wanted

# The use of a key that captures it: most of what is asked for once or twice is never asked for again.
CAPTURE_AT = 3
# Above this many tokens the device is busy for longer than the host launches, and what a capture holds grows large.
MAX_TOKENS = 1 << 15
MAX_GRAPHS = 128
# Keys whose uses are counted; sizes of images are the callers' choice, so there is no end of keys.
MAX_KEYS = 1024


def padded(images: int) -> int:
    """The batch size that `images` are padded to, by less than an eighth: all sizes to 16, then eight to the octave
    (18, 20, ... 32, 36, ... 64, 72, ...)."""
    step = 1 << max(0, (images - 1).bit_length() - 4)
    return -(-images // step) * step


class Key(NamedTuple):
    """What a graph is for: padded batches of one pixel shape, and what is wanted of some of their rows."""

    shape: PixelShape
    images: int
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True, slots=True)
class Features:
    """Of n rows: the sections of each thing wanted, contiguous [n, ...] tensors in their dtypes, and [n, wanted] bool:
    whether all values of a row in it are finite."""

    values: list[list[Tensor]]
    finite: Tensor


def compute(
    model: Model,
    pixels: Tensor,
    wanted: Sequence[Wanted],
    postprocessing: Callable[[Mapping[Output, Tensor]], Postprocessing],
) -> Features:
    """A whole forward pass, on the current stream: nothing in it waits for the device."""
    sent = postprocessing(model(pixels, dict.fromkeys(each.output for each in wanted)))
    values = [
        [
            section.to(TORCH_DTYPES[dtype]).contiguous()
            for section, dtype in zip(sent.sections(each), each.section_dtypes, strict=True)
        ]
        for each in wanted
    ]
    finite = [finite_rows([*sections, *sent.unseen(each)]) for each, sections in zip(wanted, values, strict=True)]
    return Features(values, torch.stack(finite, dim=1))


class ForwardGraph:
    """A captured forward pass, with its pixels and features at fixed addresses.

    All graphs of a device must be captured and replayed on one stream: they share their working memory, so a replay
    overwrites what the others left there, features included.
    """

    def __init__(
        self, forward: Callable[[Tensor], Features], pixels: Tensor, tables: Sequence[Tensor], pool: object
    ) -> None:
        """Capture `forward` of tensors like `pixels`, on the current stream. It must have run before, on this thread
        and stream and with this shape: libraries and kernels are loaded then, which a capture cannot do.

        `tables` are what `forward` reads beside weights; they are kept. `pool` is another graph's, None for the first.
        Raises torch.OutOfMemoryError, or RuntimeError where the device refuses. Does not wait for the device, as
        torch.cuda.graph would.
        """
        self._tables = tuple(tables)
        self._pixels = torch.empty_like(pixels)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may wait for an event meanwhile, which is its right in this mode.
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
        try:
            self._features = forward(self._pixels)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the stream must leave capture; the first error is the one to see
                self._graph.capture_end()
            raise
        self._graph.capture_end()

    @property
    def pool(self) -> object:
        return self._graph.pool()

    @property
    def nbytes(self) -> int:
        """Device memory that only this graph uses."""
        return sum(t.nbytes for t in (self._pixels, self._features.finite, *chain(*self._features.values)))

    def replay(self, pixels: Tensor, count: int) -> Features:
        """The features of the first `count` rows of `pixels`, in memory of their own, on the current stream.

        The copies here, and not the caller's streams, read and write the fixed addresses: so the next replay waits for
        no copy to or from the host, and overwrites nothing that one still needs.
        """
        self._pixels[:count].copy_(pixels[:count])
        self._graph.replay()
        return Features(
            [[section[:count].clone() for section in sections] for sections in self._features.values],
            self._features.finite[:count].clone(),
        )


@dataclass(slots=True)
class _Entry:
    uses: int = 0
    graph: ForwardGraph | None = None
    refused: bool = False


class GraphCache:
    """The graphs of a device: what has been used often enough is due, what was used longest ago makes room.

    `max_bytes` bounds what the graphs hold each for itself. The working memory that they share is that of the largest.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._captures = True
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # the latest used last

    def find(self, key: Key) -> ForwardGraph | None:
        """Count a use of `key`; its graph, where it has one."""
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        entry.uses += 1
        if len(self._entries) > MAX_KEYS:
            self._entries.popitem(last=False)
        return entry.graph

    def is_due(self, key: Key, tokens: int) -> bool:
        """Whether the key used last is to be captured, an image of it having so many tokens."""
        entry = self._entries[key]
        return (
            self._captures
            and entry.uses >= CAPTURE_AT
            and entry.graph is None
            and not entry.refused
            and key.images * tokens <= MAX_TOKENS
        )

    def refuse(self, key: Key) -> None:
        """Have none for this one, however often it is used."""
        self._entries[key].refused = True

    def stop(self) -> None:
        """Nothing is due any more; what is there is kept."""
        self._captures = False

    def keep(self, key: Key, graph: ForwardGraph) -> None:
        """Have `graph` for the key used last, and let go of others where there are too many or too large ones."""
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
        """The working memory of the graphs that are kept, None where there are none: it goes with the last of them."""
        return next((entry.graph.pool for entry in self._entries.values() if entry.graph is not None), None)

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return sum(entry.graph is not None for entry in self._entries.values())
