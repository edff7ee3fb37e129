"""The arguments of `extract`, checked and turned into a request."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from dinov3_client import _images
from dinov3_client._dtypes import FeatureDtype, wire_of
from dinov3_client._images import Source
from dinov3_serving.v1 import feature_service_pb2 as pb

TokenKind = Literal["cls", "patches", "registers"]
Preset = Literal["dinov3", "hf", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Priority = Literal["interactive", "bulk"]
OnError = Literal["raise", "return"]

_T = TypeVar("_T", bound=int)

# Of sizes and layers on the wire, uint32.
_MOST = 2**32 - 1

_PRESETS: dict[str, pb.Preset] = {
    "dinov3": pb.PRESET_DINOV3,
    "hf": pb.PRESET_HF,
    "none": pb.PRESET_NONE,
}
_INTERPOLATIONS: dict[str, pb.Interpolation] = {
    "nearest": pb.INTERPOLATION_NEAREST,
    "bilinear": pb.INTERPOLATION_BILINEAR,
    "bicubic": pb.INTERPOLATION_BICUBIC,
    "lanczos": pb.INTERPOLATION_LANCZOS,
}
_PRIORITIES: dict[str, pb.Priority] = {
    "interactive": pb.PRIORITY_INTERACTIVE,
    "bulk": pb.PRIORITY_BULK,
}


@dataclass(frozen=True)
class Options:
    """What is wanted of every image of a call, checked as far as it can be without the model."""

    kinds: tuple[TokenKind, ...]
    layers: tuple[int, ...]
    """As asked for: negative ones count from the end."""
    dtype: FeatureDtype
    preprocessing: pb.Preprocessing
    priority: pb.Priority

    @property
    def needs_depth(self) -> bool:
        return any(layer < 0 for layer in self.layers)


@dataclass(frozen=True)
class Query:
    """A request, and what its answer has to be read with."""

    message: pb.ExtractRequest
    options: Options
    blocks: tuple[int, ...]
    """The 0-based block of each of `options.layers`."""
    count: int
    labels: dict[int, str]
    """The paths of the images that were read from files."""


def options(
    *,
    outputs: TokenKind | Sequence[TokenKind],
    preset: Preset,
    size: int | tuple[int, int] | None,
    dtype: FeatureDtype,
    layers: int | Sequence[int],
    interpolation: Interpolation | None,
    exif: bool,
    priority: Priority,
) -> Options:
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs is {outputs!r}; name one or several of {_listed(get_args(TokenKind))}")
    kinds = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for kind in kinds:
        check_choice("outputs", kind, get_args(TokenKind))
    if not kinds:
        raise ValueError(f"outputs is empty; name at least one of {_listed(get_args(TokenKind))}")
    check_choice("dtype", dtype, get_args(FeatureDtype))
    if not isinstance(exif, bool):
        raise TypeError(f"exif is {exif!r}; allowed are True and False")
    preprocessing = pb.Preprocessing(
        preset=_enum("preset", preset, _PRESETS),
        interpolation=_enum("interpolation", interpolation, _INTERPOLATIONS) if interpolation is not None else None,
        apply_exif_orientation=exif,
    )
    if size is not None:
        height, width = _size(size)
        preprocessing.size.CopyFrom(pb.Size(height=height, width=width))
    try:
        given = tuple(map(operator.index, layers if isinstance(layers, Iterable) else (layers,)))
    except TypeError:
        raise TypeError(f"layers is {layers!r}; allowed are block numbers (negative ones count from the end)") from None
    for layer in given:
        if abs(layer) > _MOST:
            raise ValueError(f"layers has {layer}; no model has so many blocks")
    return Options(kinds, given, dtype, preprocessing, _enum("priority", priority, _PRIORITIES))


def query(sources: Sequence[Source], wanted: Options, depth: int | None, fingerprint: str) -> Query:
    """The request for `sources`. `depth` is the model's, needed for negative layers only.

    `fingerprint` pins the model that `depth` was taken from, so that a layer counted from the end of one model
    is never answered by another.
    """
    blocks = tuple(_block(layer, depth) for layer in wanted.layers)
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"layers {list(wanted.layers)} name a block twice: they are blocks {list(blocks)}")
    message = _images.message(sources)
    message.preprocessing.CopyFrom(wanted.preprocessing)
    message.priority = wanted.priority
    message.fingerprint = fingerprint
    flags: dict[str, Any] = dict.fromkeys(wanted.kinds, True)
    message.outputs.CopyFrom(
        pb.Outputs(
            dtype=wire_of(wanted.dtype), layers=[pb.LayerOutputs(layer=block, **flags) for block in blocks], **flags
        )
    )
    labels = {index: source.label for index, source in enumerate(sources) if source.label is not None}
    return Query(message, wanted, blocks, len(sources), labels)


def check_choice(name: str, given: object, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if given not in allowed:
        raise ValueError(f"{name} has {given!r}; allowed are {_listed(allowed)}")


def check_deadline(deadline: float) -> float:
    if not isinstance(deadline, numbers.Real):
        raise TypeError(f"deadline is {deadline!r}; it must be a positive number of seconds")
    if not (deadline > 0 and math.isfinite(deadline)):
        raise ValueError(f"deadline is {deadline!r}; it must be a positive number of seconds")
    return deadline


def _block(layer: int, depth: int | None) -> int:
    if depth is None:
        return layer
    if not -depth <= layer < depth:
        raise ValueError(f"layers has {layer}; the model has {depth} blocks: allowed are {-depth} to {depth - 1}")
    return layer % depth


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, size if isinstance(size, Iterable) else (size, size))
    except (TypeError, ValueError):
        height = width = 0
    if not (0 < height <= _MOST and 0 < width <= _MOST):
        raise ValueError(
            f"size is {size!r}; it must be a number of pixels from 1 to {_MOST} or a pair (height, width) of them"
        )
    return height, width


def _enum(name: str, given: str, values: dict[str, _T]) -> _T:
    check_choice(name, given, values)
    return values[given]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
