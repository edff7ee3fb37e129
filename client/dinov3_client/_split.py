"""Splits a call into requests that are within the server's limits."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dinov3_client import _wire
from dinov3_client._dtypes import numpy_of
from dinov3_client._errors import FieldViolation, StatusError
from dinov3_client._images import LoadedImage
from dinov3_client._model import Model
from dinov3_client._request import RequestOptions
from dinov3_serving.features import TokenKind
from dinov3_serving.v1 import feature_service_pb2 as pb

# Upper bounds, in bytes, of a message without its data. Of a request: for each image and view. Of a response: in all,
# for the block of a row (which may have an input size of its own) with its padding, for each tensor of a row, and for
# the error of each image, which may come in addition to its rows.
_IMAGE_NBYTES, _VIEW_NBYTES = 64, 64
_ANSWER_NBYTES, _BLOCK_NBYTES, _TENSOR_NBYTES, _ERROR_NBYTES = 1024, 160, 80, 1024
# The sizes of requests are balanced to this fraction of a limit.
_STEPS = 64


@dataclass(frozen=True)
class PreparedRequest:
    """A request, ready to send, and what is needed to read its response."""

    data: bytes
    """The serialized ExtractRequest."""
    fingerprint: str
    """What the fingerprint of the answer must be, or begin with before a "+"; empty: any."""
    options: RequestOptions
    layers: tuple[int, ...]
    """The 0-based index of each of `options.layers`."""
    first: int
    """The index, within the call, of its first image."""
    views: tuple[int, ...]
    """The number of views of each image; 0: none, and one row for the image."""
    labels: Mapping[int, str]
    """The paths of the images that were read from files, by their index within the call."""
    failed: Mapping[int, StatusError] = field(default_factory=dict)
    """The errors of the images that are not sent, by their place within the request."""
    answer_fingerprint: str = ""
    """The fingerprint that the answer of the model that the client knows would have."""

    @property
    def sent(self) -> list[int]:
        """The place within the request of each image that is sent."""
        return [place for place in range(len(self.views)) if place not in self.failed]

    @property
    def message(self) -> pb.ExtractRequest:
        """`data` parsed, for tests."""
        return pb.ExtractRequest.FromString(self.data)

    def of_the_call(self, error: StatusError) -> StatusError:
        """Number the images in the field names of `error` within the call, and return it."""
        sent = self.sent

        def renumbered(found: re.Match[str]) -> str:
            place = int(found[1])
            return f"images[{self.first + sent[place]}]" if place < len(sent) else found[0]

        error.violations = tuple(
            FieldViolation(
                re.sub(r"^images\[(\d+)\]", renumbered, violation.field),
                violation.description,
            )
            for violation in error.violations
        )
        return error


class _Cost(NamedTuple):
    """What an image counts against the three limits."""

    rows: int
    request_nbytes: int
    answer_nbytes: int


def split(
    sources: Sequence[LoadedImage],
    options: RequestOptions,
    model: Model,
    fingerprint: str = "",
    *,
    first: int = 0,
    is_whole: bool = True,
) -> list[PreparedRequest]:
    """Return the requests for `sources`: one, or several of about equal size if one would be over a limit.

    An image that is over a limit by itself is sent alone, for the server to refuse; one with an error is not sent.
    `first` is the index of the first image within the call, and `is_whole` says whether `sources` are all of it.
    `fingerprint` pins the model. Without it, several requests, and layers counted from the end, are pinned to `model`:
    a call is never answered by two models, or by another one than the layers were counted in.

    Raises ValueError for layers that `model` does not have.
    """
    layers = options.layer_indices(model)
    rest = options.message(model)
    answer_fingerprint = _answer_fingerprint(options, model)
    rest.fingerprint = fingerprint or answer_fingerprint
    limits = model.limits
    costs = _costs(sources, options, model)
    most = _Cost(
        limits.max_images_per_request,
        limits.max_message_bytes - rest.ByteSize(),
        limits.max_message_bytes - _ANSWER_NBYTES,
    )
    ranges = _balance(costs, most)
    if not fingerprint and is_whole and len(ranges) == 1 and all(layer.asked >= 0 for layer in options.layers):
        rest.fingerprint = ""
    found = []
    for images in ranges:
        chosen = sources[images.start : images.stop]
        found.append(
            PreparedRequest(
                data=_wire.request([source for source in chosen if source.error is None], rest),
                fingerprint=rest.fingerprint,
                options=options,
                layers=layers,
                first=first + images.start,
                views=tuple(len(source.views) for source in chosen),
                labels={
                    index: source.label
                    for index, source in enumerate(chosen, first + images.start)
                    if source.label is not None
                },
                failed={place: source.error for place, source in enumerate(chosen) if source.error is not None},
                answer_fingerprint=answer_fingerprint,
            )
        )
    return found


def _answer_fingerprint(options: RequestOptions, model: Model) -> str:
    """Return the fingerprint of the answer; without a projection that `model` lacks: the server will report it."""
    for projection in model.projections:
        if projection.name == options.projection:
            return f"{model.fingerprint}+{projection.fingerprint}"
    return model.fingerprint


def _balance(costs: Sequence[_Cost], most: _Cost) -> list[range]:
    """Return the ranges of images of requests: as few as `most` allows, and as equal as possible."""

    def ranges(step: int) -> list[range]:
        return _fill(costs, _Cost(*(limit * step // _STEPS for limit in most)))

    fewest = len(ranges(_STEPS))
    steps = range(1, _STEPS + 1)
    if fewest == 1:
        return [range(len(costs))]
    return ranges(steps[bisect_left(steps, True, key=lambda step: len(ranges(step)) <= fewest)])


def _fill(costs: Sequence[_Cost], most: _Cost) -> list[range]:
    """Fill requests one after the other up to `most`, with at least one image in each."""
    ranges: list[range] = []
    start, total = 0, costs[0]
    for index, cost in enumerate(costs[1:], 1):
        together = _Cost(*map(sum, zip(total, cost, strict=True)))
        if any(used > limit for used, limit in zip(together, most, strict=True)):
            ranges.append(range(start, index))
            start, total = index, cost
        else:
            total = together
    return [*ranges, range(start, len(costs))]


def _costs(sources: Sequence[LoadedImage], options: RequestOptions, model: Model) -> list[_Cost]:
    row_nbytes = _RowNbytes(options, model)
    fixed = options.size or next(preset.size for preset in model.presets if preset.name == options.preset)
    costs = []
    for source in sources:
        if source.error is not None:
            costs.append(_Cost(0, 0, 0))
            continue
        answer = sum(row_nbytes[size] for size in _input_sizes(source, fixed))
        request = _IMAGE_NBYTES + _VIEW_NBYTES * len(source.views) + source.nbytes
        costs.append(_Cost(source.rows, request, _ERROR_NBYTES + answer))
    return costs


def _input_sizes(source: LoadedImage, fixed: tuple[int, int] | None) -> Iterable[tuple[int, int] | None]:
    """Return the model's input size of each row; None if the file's header cannot be read, so that it has no row."""
    if not isinstance(source.data, bytes) and source.data.dtype == np.float32:
        return [source.pixel_size()]
    whole = None
    if not fixed and not all(view.HasField("size") or view.HasField("crop") for view in source.views or [pb.View()]):
        whole = source.pixel_size()
    sizes: list[tuple[int, int] | None] = []
    for view in source.views or [pb.View()]:
        if view.HasField("size"):
            sizes.append((view.size.height, view.size.width))
        elif not fixed and view.HasField("crop"):
            sizes.append((view.crop.height, view.crop.width))
        else:
            sizes.append(fixed or whole)
    return sizes


class _RowNbytes(dict[tuple[int, int] | None, int]):
    """Upper bounds of the bytes of a row in the response, framing included, by input size."""

    def __init__(self, options: RequestOptions, model: Model) -> None:
        super().__init__({None: 0})
        self._options = options
        self._model = model
        last: list[tuple[tuple[TokenKind, ...], int, int]] = [(options.kinds, model.embed_dim, model.patch_size)]
        self._layers = last + [
            (layer.kinds, model.layer_dims[index], model.layer_strides[index])
            for index, layer in zip(options.layer_indices(model), options.layers, strict=True)
        ]

    def __missing__(self, size: tuple[int, int]) -> int:
        item = numpy_of(self._options.dtype).itemsize
        scale = 4 if self._options.dtype == "int8" else 0
        total = _BLOCK_NBYTES
        for kinds, channels, stride in self._layers:
            for kind in kinds:
                tokens, width = self._tokens(kind, size, stride), self._channels(kind, channels)
                total += _TENSOR_NBYTES + tokens * (width * item + scale)
        self[size] = total
        return total

    def _tokens(self, kind: TokenKind, size: tuple[int, int], stride: int) -> int:
        if kind == "cls":
            return 1
        if kind == "registers":
            return self._model.register_tokens
        pooling = self._options.pooling
        return math.prod(pooling.grid if pooling else (side // stride for side in size))

    def _channels(self, kind: TokenKind, channels: int) -> int:
        if kind == "patches":
            for projection in self._model.projections:
                if projection.name == self._options.projection:
                    return projection.output_channels
        return channels
