"""Requests whose right answers are known: what `make chaos` asks, and how it tells a wrong answer from a right one.

A question is asked through our client (`ask`) and through plain gRPC (`request`, read back by `from_response`), which
share no code on the way back. Its truth is the answer that the same server gave undisturbed, before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attack.images import damaged, image_file, photo, sound_files
from dinov3_client import Client, ExtractOptions, Features
from dinov3_serving.v1 import feature_service_pb2 as pb

TOLERANCE = 1e-5
"""Of |answer - truth| / |truth|, Euclidean norms over each tensor of each row, in float32."""
SIZES = ((32, 32), (32, 32), (48, 64), (48, 64), (64, 64), (96, 96), (112, 64), (224, 224))
_KINDS = ("cls", "patches", "registers")
# Codes of an image that may be told in its place while processes die, and say nothing of the image.
_PASSING = frozenset({4, 8, 14})  # DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """Tensors by name, a row for each image, zeros where it failed; the gRPC codes of the images that failed."""

    tensors: Mapping[str, Floats]
    failed: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """`images` are files, or arrays [H, W, 3] of uint8; `size` is the model's input, and `layers` have CLS too."""

    images: tuple[bytes | NDArray[np.uint8], ...]
    size: tuple[int, int]
    kinds: tuple[Any, ...] = ("cls", "patches")
    layers: tuple[int, ...] = ()

    @property
    def options(self) -> ExtractOptions:
        return {"size": self.size, "layers": self.layers, "dtype": "float32", "on_error": "return"}

    def ask(self, client: Client) -> Answer:
        return from_features(client.extract(list(self.images), self.kinds, **self.options))

    def request(self) -> pb.ExtractRequest:
        request = pb.ExtractRequest(images=[_message(image) for image in self.images])
        request.preprocessing.size.height, request.preprocessing.size.width = self.size
        request.outputs.dtype = pb.DATA_TYPE_FLOAT32
        for kind in self.kinds:
            setattr(request.outputs, kind, True)
        for layer in self.layers:
            request.outputs.layers.add(layer=layer, **dict.fromkeys(self.kinds, True))
        return request


def draw(rng: random.Random, sizes: Sequence[tuple[int, int]] = SIZES, depth: int = 12) -> Question:
    """Of one to eight images, of which one in eight is damaged."""
    images = tuple(_image(rng) for _ in range(rng.choice((1, 1, 1, 2, 4, 8))))
    kinds = tuple(kind for kind in _KINDS if kind == "cls" or rng.random() < 0.5)
    layers = tuple(sorted(rng.sample(range(depth), 2))) if rng.random() < 0.2 else ()
    return Question(images, rng.choice(sizes), kinds, layers)


def from_features(features: Features) -> Answer:
    tensors = {kind: value for kind in _KINDS if (value := getattr(features, kind)) is not None}
    for index, layer in features.layers.items():
        tensors |= {f"{kind}{index}": value for kind in _KINDS if (value := getattr(layer, kind)) is not None}
    return Answer(tensors, {index: error.code.value[0] for index, error in features.errors.items()})


def from_response(response: pb.ExtractResponse) -> Answer:
    """Of one that has a single block, as all questions' have."""
    (block,) = response.blocks
    found = [("", block), *((str(layer.layer), layer) for layer in block.layers)]
    tensors = {
        f"{kind}{index}": np.frombuffer(getattr(of, kind).data, np.float32).reshape(tuple(getattr(of, kind).shape))
        for index, of in found
        for kind in _KINDS
        if of.HasField(kind)
    }
    return Answer(tensors, {error.image_index: error.status.code for error in response.errors})


def differs(truth: Answer, answer: Answer) -> str | None:
    """How the answer is wrong; None where it is right, or images failed for what says nothing of them (`passing`)."""
    if truth.tensors.keys() != answer.tensors.keys():
        return f"has {sorted(answer.tensors)}, not {sorted(truth.tensors)}"
    missed = passing(truth, answer)
    failed = {index: code for index, code in answer.failed.items() if index not in missed}
    expected = {index: code for index, code in truth.failed.items() if index not in missed}
    if failed != expected:
        return f"images failed with {failed}, not with {expected}"
    for name, right in truth.tensors.items():
        given = answer.tensors[name]
        if given.shape != right.shape:
            return f"{name} has the shape {given.shape}, not {right.shape}"
        error = relative_error(right, given)
        error[list(missed)] = 0.0
        worst = int(np.argmax(error))
        if not error[worst] <= TOLERANCE:
            return f"{name} of row {worst} is off by {error[worst]:.2g}"
    return None


def passing(truth: Answer, answer: Answer) -> set[int]:
    """Images that failed, or failed otherwise, because the server had no time, no room or no process for them."""
    return {index for index, code in answer.failed.items() if code in _PASSING and truth.failed.get(index) != code}


def relative_error(truth: Floats, given: Floats) -> NDArray[np.float64]:
    """[rows]; NaN where the answer is not finite, and 0 where both are zeros."""
    right, other = (array.reshape(len(array), -1).astype(np.float64) for array in (truth, given))
    norms = np.linalg.norm(right, axis=1)
    error: NDArray[np.float64] = np.linalg.norm(other - right, axis=1) / np.where(norms > 0, norms, 1.0)
    return error


def _image(rng: random.Random) -> bytes | NDArray[np.uint8]:
    kind = rng.random()
    if kind < 0.2:
        height, width = rng.choice((40, 64, 300)), rng.choice((50, 64, 200))
        return np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), np.uint8)
    if kind < 0.8:
        return photo(rng)
    return rng.choice(sound_files()) if kind < 0.875 else damaged(rng, image_file(rng))


def _message(image: bytes | NDArray[np.uint8]) -> pb.Image:
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    return pb.Image(pixels=pb.Tensor(dtype=pb.DATA_TYPE_UINT8, shape=image.shape, data=image.tobytes()))
