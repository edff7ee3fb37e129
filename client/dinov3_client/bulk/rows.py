"""Turns features into rows: the named arrays of one image, as stored in shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from dinov3_client._dtypes import Array
from dinov3_client._features import Features, ImageFeatures, LayerFeatures
from dinov3_client._fit import Fit
from dinov3_client.bulk.reading import ImageEntry
from dinov3_serving.features import FeatureDtype, TokenKind
from dinov3_serving.presets import Interpolation, PresetName

Format = Literal["safetensors", "parquet", "npz"]

SCALES = "_scales"
"""Suffix of the name of an int8 array's float32 scales, one per token: feature = value * scale."""


@dataclass(frozen=True)
class ExtractionOptions:
    """All that determines ids, rows and values, besides the model and the images."""

    format: Format = "safetensors"
    outputs: tuple[TokenKind, ...] = ("cls", "patches")
    layers: tuple[int, ...] = ()
    """0 .. depth - 1."""
    preset: PresetName = "dinov3"
    size: tuple[int, int] | None = None
    interpolation: Interpolation | None = None
    exif: bool = False
    fit: Fit = field(default_factory=Fit)
    background: tuple[int, int, int] | None = None
    allow_truncated: bool = False
    dtype: FeatureDtype = "float16"
    pool: tuple[int, int] | None = None
    projection: str | None = None
    shard_rows: int = 4096
    """The most rows of a shard."""

    @classmethod
    def of_header(cls, options: Mapping[str, Any]) -> ExtractionOptions:
        """Return the options that a manifest's header has as JSON."""

        def values(given: Mapping[str, Any]) -> dict[str, Any]:
            return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

        return cls(**values(options) | {"fit": Fit(**values(options.get("fit", {})))})

    @property
    def mixed(self) -> bool:
        """Whether images may have several input sizes."""
        return self.preset == "none" and self.size is None

    def extract_arguments(self) -> dict[str, Any]:
        """Return the arguments for `Client.extract_many`."""
        return {
            "outputs": self.outputs,
            "layers": self.layers,
            "preset": self.preset,
            "size": self.size,
            "interpolation": self.interpolation,
            "exif": self.exif,
            "fit": self.fit,
            "background": self.background,
            "allow_truncated": self.allow_truncated,
            "dtype": self.dtype,
            "pooling": self.pool,
            "projection": self.projection,
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that has no features."""

    id: str
    index: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """The features of one image. D channels, P patches, G registers."""

    id: str
    index: int
    """Its place in the source."""
    source: str
    stem: str
    """Path, without ending, of an npz file named after it."""
    sha256: str
    """Of the bytes of its file."""
    input_size: tuple[int, int]
    grids: Mapping[str, tuple[int, int]]
    """`grid` and, of each layer, `layerI_grid`: rows and columns of its patches."""
    arrays: Mapping[str, Array]
    """cls [D], patches [P, D], registers [G, D], layerI_cls, ...; for int8 also NAME_scales [] or [tokens]."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def rows(entries: Sequence[ImageEntry], features: Features, options: ExtractionOptions) -> list[Row]:
    """Return the rows of the images of a batch that have features; `entries` are those of all its images."""
    good = {index: features[index] for index in range(len(features)) if index not in features.errors}
    sizes = {index: image.input_size for index, image in good.items()}
    if options.dtype == "int8":
        arrays = _quantized(features, set(sizes.values()), options)
    else:
        arrays = {index: _arrays(image, options) for index, image in good.items()}
    return [
        Row(
            entry.item.id,
            entry.index,
            entry.item.source,
            entry.item.stem,
            entry.sha256,
            sizes[index],
            {f"{prefix}grid": of.grid for prefix, of in _layers(image, options.layers)},
            arrays[index],
        )
        for index, image in good.items()
        for entry in (entries[index],)
    ]


def _layers(image: ImageFeatures, layers: Iterable[int]) -> list[tuple[str, LayerFeatures[Array]]]:
    """Return the tokens of the last layer and of `layers`, each with the prefix of their names."""
    return [("", image), *((f"layer{layer}_", image.layers[layer]) for layer in layers)]


def _arrays(image: ImageFeatures, options: ExtractionOptions) -> dict[str, Array]:
    found: dict[str, Array] = {
        f"{prefix}{kind}": getattr(of, kind)
        for prefix, of in _layers(image, options.layers)
        for kind in get_args(TokenKind)
        if kind in options.outputs
    }
    if options.format == "parquet" and options.dtype == "bfloat16":  # which Arrow lacks; float32 has all its values
        return {name: array.astype(np.float32) for name, array in found.items()}
    return found


def _quantized(
    features: Features, sizes: Iterable[tuple[int, int]], options: ExtractionOptions
) -> dict[int, dict[str, Array]]:
    """Return the int8 values and scales of each image, as received; `sizes` are all input sizes."""
    found: dict[int, dict[str, Array]] = {}
    for size in sizes:
        alike = features.at_size(size)
        for layer in (None, *options.layers):
            for kind in options.outputs:
                name = kind if layer is None else f"layer{layer}_{kind}"
                quantized = alike.quantized(kind, layer)
                assert quantized is not None, "asked for"
                for image, value, scale in zip(alike.images, *quantized, strict=True):
                    # The single scale of a CLS token is an array of no dimensions.
                    found.setdefault(int(image), {}).update({name: value, name + SCALES: np.asarray(scale)})
    return found
