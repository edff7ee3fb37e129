"""A runner without a model: features are a formula of the pixels, which reveals rows in a wrong place.

For uint8 pixels let m be the mean of an image's patch (16x16 pixels, all channels) as float32. Then
    patches[p, d] = m[p] + d / 1024,  cls[d] = mean(m) + d / 1024,  registers[g, d] = cls[d] + 1 + g,
and an intermediate layer l adds 2 + l (5 more without norm). Layer 0 has half the channels and patches of 8x8 pixels.
`expected` computes it for a test; numpy_postprocessing.py computes the output buffers.

The first pixel of an image can script an event for its batch (`DIE`, `KILL`, `FAIL`, `NAN`, `BLOCK`, `OOM`, `LOST`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinov3_server.models.interface import (
    Batch,
    BatchResult,
    DeviceLost,
    DeviceOutOfMemory,
    ModelInfo,
    Output,
    PixelShape,
    Projection,
    Row,
)
from tests.support.numpy_postprocessing import Floats, postprocess

DIMS = (32, 64, 64, 64)
STRIDES = (8, 16, 16, 16)

# RGB of the first pixel, and the event.
DIE = (255, 0, 1)  # the worker process ends by itself
KILL = (255, 0, 7)  # the worker process dies by SIGKILL
FAIL = (255, 0, 2)  # the batch raises
NAN = (255, 0, 3)  # this image's features are not finite
BLOCK = (255, 0, 4)  # the batch makes the file TEST_GATE_FILE + REACHED, and waits until TEST_GATE_FILE exists
OOM = (255, 0, 5)  # a batch of more than two images does not fit
LOST = (255, 0, 6)  # the device is lost

REACHED = ".reached"


def expected(pixels: NDArray[np.uint8], output: Output) -> NDArray[np.float32]:
    """Return the features of one image [H, W, 3]: [D] for cls, else [tokens, D]."""
    height, width, _ = pixels.shape
    layer = -1 if output.layer is None else output.layer
    side = STRIDES[layer]
    cells = pixels.astype(np.float32).reshape(height // side, side, width // side, side, 3)
    patches = cells.mean(axis=(1, 3, 4)).reshape(-1, 1)
    channels = np.arange(DIMS[layer], dtype=np.float32) / 1024
    shift = 0 if output.layer is None else 2 + output.layer + (0 if output.norm else 5)
    cls = patches.mean() + channels + shift
    match output.kind:
        case "cls":
            return cls
        case "registers":
            return cls + 1 + np.arange(4, dtype=np.float32)[:, None]
        case _:
            return patches + channels + shift


@dataclass
class _Launched:
    batch: Batch


class NumpyRunner:
    pipeline_depth = 2

    def __init__(self, device: str, projections: Mapping[str, Floats] = MappingProxyType({})) -> None:
        self._projections = projections
        self.info = ModelInfo(
            name="numpy",
            weights="formula",
            random_weights=True,
            fingerprint="f0",
            dtype="float32",
            device=device,
            layer_dims=DIMS,
            layer_strides=STRIDES,
            register_tokens=4,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            parameters=0,
            projections=tuple(
                Projection(name, matrix.shape[1], matrix.shape[0], f"of-{name}") for name, matrix in projections.items()
            ),
        )
        self.load_seconds = {"build": 0.0}
        self._arenas: dict[int, memoryview] = {}

    def attach(self, arena: int, memory: memoryview) -> None:
        self._arenas[arena] = memory

    def detach(self, arena: int) -> None:
        del self._arenas[arena]

    def launch(self, batch: Batch) -> _Launched:
        return _Launched(batch)

    def finish(self, launched: _Launched) -> BatchResult:
        batch = launched.batch
        images = [self._pixels(row, batch.shape) for row in batch.rows]
        orders = [tuple(int(v) for v in image[0, 0]) if batch.shape.format == "uint8" else () for image in images]
        if BLOCK in orders:
            gate = os.environ["TEST_GATE_FILE"]
            Path(gate + REACHED).touch()
            pause = threading.Event()
            while not Path(gate).exists():
                pause.wait(0.005)
        if DIE in orders:
            os._exit(3)
        if KILL in orders:
            os.kill(os.getpid(), signal.SIGKILL)
        if LOST in orders:
            raise DeviceLost("scripted")
        if FAIL in orders:
            raise RuntimeError("scripted failure")
        if OOM in orders and len(orders) > 2:
            raise DeviceOutOfMemory("scripted")
        for row, image in zip(batch.rows, images, strict=True):
            self._write(row, batch.shape, image)
        return BatchResult(tuple(order != NAN for order in orders), 0.0, 0.0, 0.0)

    def _pixels(self, row: Row, shape: PixelShape) -> NDArray[np.uint8]:
        raw = self._arenas[row.arena][row.pixel_offset : row.pixel_offset + shape.nbytes]
        if shape.format == "uint8":
            return np.frombuffer(raw, np.uint8).reshape(shape.height, shape.width, 3)
        planes = np.frombuffer(raw, np.float32).reshape(3, shape.height, shape.width)
        return planes.transpose(1, 2, 0)  # type: ignore[return-value]

    def _write(self, row: Row, shape: PixelShape, image: NDArray[np.uint8]) -> None:
        arrays: list[NDArray[Any]] = []
        for output in row.spec.outputs:
            grid = self.info.grid(shape, output.layer)
            arrays += postprocess(expected(image, output), row.spec.output_spec(output), grid, self._projections)
        buffers = self.info.output_buffers(row.spec, shape)
        for array, buffer, start in zip(arrays, buffers, row.output_offsets, strict=True):
            assert (array.shape, array.dtype.name) == (buffer.shape, buffer.dtype)
            self._arenas[row.arena][start : start + buffer.nbytes] = array.tobytes()

    def memory(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        assert not self._arenas


def build(
    model: str, weights: str, *, device: str, projections: Iterable[tuple[str, str]] = (), **_: object
) -> NumpyRunner:
    return NumpyRunner(device, {name: np.load(path) for name, path in projections})
