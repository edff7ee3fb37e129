"""The options of `extract`: their checks, and the part of a request that they determine."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, get_args

from dinov3_client import _fit
from dinov3_client._checks import (
    UINT32_MAX,
    check_bool,
    check_choice,
    check_deadline,
    pixel_size,
    quoted,
)
from dinov3_client._dtypes import wire_of
from dinov3_client._fit import ColorLike, Fit
from dinov3_client._model import Model
from dinov3_serving.features import FeatureDtype, PoolingMethod, TokenKind
from dinov3_serving.images import Color, Decoding
from dinov3_serving.presets import FitMethod, Interpolation, PresetName
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.enums import FIT_METHODS, INTERPOLATIONS, POOLING_METHODS, PRESETS

Priority = Literal["interactive", "bulk"]
OnError = Literal["raise", "return"]

_METHODS = {number: name for name, number in FIT_METHODS.items()}

KINDS: tuple[TokenKind, ...] = get_args(TokenKind)

_PRIORITIES: dict[str, pb.Priority] = {
    "interactive": pb.PRIORITY_INTERACTIVE,
    "bulk": pb.PRIORITY_BULK,
}


@dataclass(frozen=True)
class Layer:
    """A layer whose tokens are returned in addition."""

    index: int
    """0-based: a block of a ViT, a stage of a ConvNeXt. Negative numbers count from the end."""
    outputs: TokenKind | Sequence[TokenKind] | None = None
    """Any of "cls", "patches" and "registers". None: the outputs of the call."""
    norm: bool = True
    """Apply the model's final norm, as upstream's get_intermediate_layers does (of a ConvNeXt, to the last stage only).
    False: the output of the layer itself."""

    def __post_init__(self) -> None:
        _check_index(self.index)
        check_bool("norm", self.norm)
        if self.outputs is not None and not _kinds(self.outputs):
            raise ValueError(f"outputs of layer {self.index} is empty; name at least one of {quoted(KINDS)}")


@dataclass(frozen=True)
class Pooling:
    """Resample patches to a grid of fixed size, on the server's device."""

    grid: tuple[int, int]
    """(rows, columns)."""
    method: PoolingMethod = "area"
    """"area": the mean of the patches that each cell covers, wholly or partly, as torch's adaptive_avg_pool2d.
    "bilinear": as torch's interpolate(mode="bilinear", align_corners=False), without antialias."""

    def __post_init__(self) -> None:
        pixels = isinstance(self.grid, Iterable) and not isinstance(self.grid, str)
        try:
            rows, columns = map(operator.index, self.grid if pixels else ())
        except (TypeError, ValueError):
            rows = columns = 0
        if not (0 < rows <= UINT32_MAX and 0 < columns <= UINT32_MAX):
            raise ValueError(f"pooling's grid is {self.grid!r}; it must be (rows, columns), both at least 1")
        object.__setattr__(self, "grid", (rows, columns))  # a tuple of ints, to compare with the grid of a response
        check_choice("pooling's method", self.method, POOLING_METHODS)


class ExtractOptions(TypedDict, total=False):
    """The keyword options of `extract` and `extract_many`; all are optional."""

    preset: PresetName
    """How to resize images to the model's input. "dinov3" (default): to 256x256, "hf": to 224x224, both bilinear with
    antialias; "none" keeps the pixels, whose height and width must be multiples of the patch size."""
    size: int | tuple[int, int] | None
    """Size of the model's input in pixels, one number or (height, width), instead of the preset's."""
    dtype: FeatureDtype
    """The dtype in which features are sent: "float32", "float16" (default), "bfloat16" (ml_dtypes') or "int8": one byte
    per value and one float32 scale per token, read as float32, value * scale."""
    layers: int | Layer | Sequence[int | Layer]
    """Layers (blocks of a ViT, stages of a ConvNeXt) whose tokens are returned in addition. A number stands for
    `Layer(number)`: the outputs of the call, after the final norm. Negative numbers count from the end."""
    interpolation: Interpolation | None
    """"nearest", "bilinear", "bicubic" or "lanczos", instead of the preset's."""
    exif: bool
    """Rotate images by their EXIF orientation first. Default False, as in training loaders."""
    fit: Fit | FitMethod
    """How to bring pictures to the size if their aspect ratio differs: "stretch" (default), "crop" (resize until the
    input is covered, and crop the center), "pad" (resize until it fits, and add borders), or a Fit with details."""
    background: ColorLike | None
    """The color under transparent pixels, (red, green, blue) or text such as "white". None (default) drops alpha, as
    training loaders do: the color stored under it shows."""
    allow_truncated: bool
    """Decode files whose end is missing, as Pillow does with ImageFile.LOAD_TRUNCATED_IMAGES. Default False."""
    priority: Priority
    """"bulk" requests give way to "interactive" (default) ones."""
    on_error: OnError
    """"raise" (default) raises ImageErrors if any image fails, and OSError or ValueError if one cannot be read here;
    "return" returns the features, with zeros for failed images, and their errors in `Features.errors`."""
    deadline: float | None
    """Seconds that the call may take in all. None: the client's."""
    pooling: Pooling | tuple[int, int] | None
    """Resample all patches to this grid; a pair (rows, columns) is pooled by area."""
    projection: str | None
    """Name of one of `model().projections`, applied to the channels of all patches."""
    channels_first: bool
    """Return patches as [N, D, rows, columns], a feature map, instead of [N, P, D]."""


_DEFAULTS: ExtractOptions = {
    "preset": "dinov3",
    "size": None,
    "dtype": "float16",
    "layers": (),
    "interpolation": None,
    "exif": False,
    "fit": "stretch",
    "background": None,
    "allow_truncated": False,
    "priority": "interactive",
    "on_error": "raise",
    "deadline": None,
    "pooling": None,
    "projection": None,
    "channels_first": False,
}


@dataclass(frozen=True)
class ResolvedLayer:
    """A Layer with its outputs filled in."""

    asked: int
    """The number as requested; negative ones count from the end."""
    kinds: tuple[TokenKind, ...]
    norm: bool


@dataclass(frozen=True)
class RequestOptions:
    """The options of a call, checked as far as possible without the model."""

    kinds: tuple[TokenKind, ...]
    """Of the last layer."""
    layers: tuple[ResolvedLayer, ...]
    dtype: FeatureDtype
    preset: PresetName
    size: tuple[int, int] | None
    interpolation: Interpolation | None
    exif: bool
    fit: pb.Fit
    background: Color | None
    allow_truncated: bool
    priority: Priority
    on_error: OnError
    deadline: float | None
    pooling: Pooling | None
    projection: str
    """Empty: none."""
    channels_first: bool

    @property
    def decoding(self) -> Decoding:
        """The options for decoding files."""
        return Decoding(self.exif, self.background, self.allow_truncated)

    def layer_indices(self, model: Model) -> tuple[int, ...]:
        """Return the 0-based index of each of `layers`. Raises ValueError for layers that `model` does not have."""
        depth = model.depth
        for layer in self.layers:
            if not -depth <= layer.asked < depth:
                raise ValueError(
                    f"layers has {layer.asked}; the model has {depth} layers: allowed are {-depth} to {depth - 1}"
                )
        asked = [layer.asked for layer in self.layers]
        indices = tuple(layer % depth for layer in asked)
        if len(set(indices)) < len(indices):
            raise ValueError(f"layers {asked} name a layer twice: they are layers {list(indices)}")
        return indices

    def message(self, model: Model) -> pb.ExtractRequest:
        """Return the request without its images. Raises ValueError for what the server does not have."""
        fit = _METHODS[self.fit.method]
        if fit not in model.fit_methods:
            raise ValueError(f"fit is {fit!r}; this server, version {model.server_version}, only stretches")
        request = pb.ExtractRequest(
            preprocessing=pb.Preprocessing(
                preset=PRESETS[self.preset],
                size=pb.Size(height=self.size[0], width=self.size[1]) if self.size else None,
                interpolation=INTERPOLATIONS[self.interpolation] if self.interpolation else None,
                apply_exif_orientation=self.exif,
                fit=self.fit if fit != "stretch" else None,
                background=pb.Color(**self.background._asdict()) if self.background else None,
                allow_truncated=self.allow_truncated,
            ),
            priority=_PRIORITIES[self.priority],
            outputs=pb.Outputs(
                dtype=wire_of(self.dtype),
                layers=[
                    pb.LayerOutputs(layer=index, skip_norm=not layer.norm, **_flags(layer.kinds))
                    for index, layer in zip(self.layer_indices(model), self.layers, strict=True)
                ],
                projection=self.projection,
                patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST if self.channels_first else None,
                **_flags(self.kinds),
            ),
        )
        if self.pooling:
            rows, columns = self.pooling.grid
            method = POOLING_METHODS[self.pooling.method]
            request.outputs.pooling.CopyFrom(pb.Pooling(grid_height=rows, grid_width=columns, method=method))
        return request


def check_options(
    outputs: TokenKind | Sequence[TokenKind] = ("cls", "patches"), **given: Unpack[ExtractOptions]
) -> RequestOptions:
    """Return the options of a call. Raises TypeError or ValueError for options that no model accepts."""
    unknown = [name for name in given if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(_DEFAULTS)}")
    asked: ExtractOptions = {**_DEFAULTS, **given}
    for name, choices in (("preset", PRESETS), ("priority", _PRIORITIES)):
        check_choice(name, asked[name], choices)  # type: ignore[literal-required]
    check_choice("dtype", asked["dtype"], get_args(FeatureDtype))
    check_choice("on_error", asked["on_error"], get_args(OnError))
    size, interpolation, deadline, projection = (
        asked["size"],
        asked["interpolation"],
        asked["deadline"],
        asked["projection"],
    )
    background = asked["background"]
    if interpolation is not None:
        check_choice("interpolation", interpolation, INTERPOLATIONS)
    if projection is not None and not (isinstance(projection, str) and projection):
        raise TypeError(f"projection is {projection!r}; it must be the name of one of model().projections, or None")
    pooling = asked["pooling"]
    kinds = _kinds(outputs)
    return RequestOptions(
        kinds=kinds,
        layers=_layers(asked["layers"], kinds),
        dtype=asked["dtype"],
        preset=asked["preset"],
        size=None if size is None else pixel_size("size", size),
        interpolation=interpolation,
        exif=check_bool("exif", asked["exif"]),
        fit=_fit.message(asked["fit"]),
        background=None if background is None else _fit.read_color("background", background),
        allow_truncated=check_bool("allow_truncated", asked["allow_truncated"]),
        priority=asked["priority"],
        on_error=asked["on_error"],
        deadline=None if deadline is None else check_deadline(deadline),
        pooling=pooling if pooling is None or isinstance(pooling, Pooling) else Pooling(pooling),
        projection=projection or "",
        channels_first=check_bool("channels_first", asked["channels_first"]),
    )


def _kinds(outputs: TokenKind | Sequence[TokenKind]) -> tuple[TokenKind, ...]:
    """Return the kinds in the order of KINDS, each once."""
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs is {outputs!r}; name one or several of {quoted(KINDS)}")
    given = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    for kind in given:
        check_choice("outputs", kind, KINDS)
    return tuple(kind for kind in KINDS if kind in given)


def _layers(layers: int | Layer | Sequence[int | Layer], kinds: tuple[TokenKind, ...]) -> tuple[ResolvedLayer, ...]:
    several = layers if isinstance(layers, Iterable) else (layers,)
    given = [layer if isinstance(layer, Layer) else Layer(layer) for layer in several]
    if not kinds and (not given or any(layer.outputs is None for layer in given)):
        raise ValueError(
            f"outputs is empty; name at least one of {quoted(KINDS)}, or give layers with outputs of their own: "
            "outputs=(), layers=Layer(3, outputs='cls')"
        )
    return tuple(
        ResolvedLayer(
            operator.index(layer.index), kinds if layer.outputs is None else _kinds(layer.outputs), layer.norm
        )
        for layer in given
    )


def _check_index(index: int) -> None:
    try:
        number = operator.index(index)
    except TypeError:
        raise TypeError(
            f"layers has {index!r}; allowed are Layer and layer numbers (negative ones count from the end)"
        ) from None
    if abs(number) > UINT32_MAX:
        raise ValueError(f"layers has {number}; no model has so many layers")


def _flags(kinds: Iterable[TokenKind]) -> dict[str, Any]:
    return dict.fromkeys(kinds, True)
