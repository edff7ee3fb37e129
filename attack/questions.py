"""Requests with known answers: the questions of `make chaos`, and the comparison of answers.

A question is sent by our client (`ask`) or over plain gRPC (`request`, whose answer `from_response` reads); the two
share no code for answers. The truth is the answer of the same server before the disturbances.
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
"""The largest allowed |answer - truth| / |truth|, Euclidean norms over each tensor of each row, in float32."""
SIZES = ((32, 32), (32, 32), (48, 64), (48, 64), (64, 64), (96, 96), (112, 64), (224, 224))
_KINDS = ("cls", "patches", "registers")
# Codes that an image may get while processes die, and that do not depend on the image.
_PASSING = frozenset({4, 8, 14})  # DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """Tensors by name, a row for each image, zeros if it failed; the gRPC codes of the failed images."""

    tensors: Mapping[str, Floats]
    failed: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A request. `images` are files, or arrays [H, W, 3] of uint8; `size` is the size of the model's input."""

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
    """Draw a question of one to eight images, one in eight of which is damaged."""
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
    """Read a response with a single block, as the answers to all questions have."""
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
    """Return how the answer is wrong; None if it is right, or images failed for reasons outside of them (`passing`)."""
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
    """Return the images that failed because the server had no time, no room or no process for them."""
    return {index for index, code in answer.failed.items() if code in _PASSING and truth.failed.get(index) != code}


def relative_error(truth: Floats, given: Floats) -> NDArray[np.float64]:
    """Return the relative error of each row, [rows]; NaN if the answer is not finite, 0 if both are zeros."""
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
