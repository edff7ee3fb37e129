"""The model on a CUDA device: copies and computation on streams of their own, nothing waited for but a batch's end.

While one batch is computed the next is copied in and the one before is copied out, straight from and to the
page-locked arenas. A slot holds what a batch in flight needs to itself; it is free again when the batch is finished.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dinov3_server.backbone.interface import Batch, Finished, Launched, ModelInfo
from dinov3_server.backbone.plan import feature_runs, pixel_runs, wanted_outputs
from dinov3_server.backbone.torch_runner import TORCH_DTYPES, TorchRunner, finite_rows, pixel_layout
from dinov3_server.backbone.vit import VisionTransformer


class CudaRunner(TorchRunner):
    """`launch` only enqueues; `finish` waits for one event and reads times and flags."""

    pipeline_depth = 2

    def __init__(self, model: VisionTransformer, info: ModelInfo) -> None:
        super().__init__(model, info)
        self._device = model.device
        with torch.cuda.device(self._device):
            self._copy_in, self._compute, self._copy_out = (
                torch.cuda.Stream()  # type: ignore[no-untyped-call]
                for _ in range(3)
            )
            self._free = deque(_Slot() for _ in range(self.pipeline_depth))
            # The weights were made on the default stream, which the three others do not wait for.
            torch.cuda.synchronize()

    def attach(self, arena: int, memory: memoryview) -> None:
        super().attach(arena, memory)
        pages = self._arenas[arena]
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            result = int(cudart.cudaHostRegister(pages.data_ptr(), pages.numel(), 0))
        if result:
            super().detach(arena)
            raise RuntimeError(f"cudaHostRegister could not page-lock {len(memory)} bytes: CUDA error {result}")

    def detach(self, arena: int) -> None:
        with torch.cuda.device(self._device):
            cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self._arenas[arena].data_ptr())
        super().detach(arena)

    def launch(self, batch: Batch) -> Launched:
        slot = self._free.popleft()
        try:
            return self._guarded(lambda: self._enqueue(batch, slot))
        except BaseException:
            self._free.append(slot)
            raise

    def finish(self, launched: Launched) -> Finished:
        flight = cast(_Launched, launched)
        try:
            return self._guarded(lambda: self._collect(flight))
        finally:
            self._free.append(flight.slot)

    def memory(self) -> dict[str, int]:
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "total": torch.cuda.get_device_properties(self._device).total_memory,
        }

    @torch.inference_mode()
    def _enqueue(self, batch: Batch, slot: _Slot) -> _Launched:
        count = len(batch.rows)
        runs = [(run, self._features_in_arena(run, batch.shape)) for run in feature_runs(batch, self.info)]
        with torch.cuda.device(self._device):
            pixels = slot.pixels(count * batch.shape.nbytes, self._device)
            dtype, shape = pixel_layout(count, batch.shape)
            pixels = pixels.view(dtype).view(shape)

            with torch.cuda.stream(self._copy_in):
                slot.copy_in_begins.record()
                for piece in pixel_runs(batch):
                    source = self._pixels_in_arena(piece.arena, piece.offset, piece.count, batch.shape)
                    pixels[piece.first : piece.first + piece.count].copy_(source, non_blocking=True)
                slot.copy_in_ends.record()

            with torch.cuda.stream(self._compute):
                self._compute.wait_event(slot.copy_in_ends)
                slot.forward_begins.record()
                features = self._model(pixels, wanted_outputs(batch))
                # Everything that takes device memory comes before the first copy out: a batch that does not fit
                # has written nothing into an arena.
                converted = [
                    [
                        features[output][run.first : run.first + run.count]
                        .to(TORCH_DTYPES[run.spec.dtype])
                        .contiguous()
                        for output in run.spec.outputs
                    ]
                    for run, _ in runs
                ]
                finite = torch.cat([finite_rows(values) for values in converted])
                slot.forward_ends.record()

            with torch.cuda.stream(self._copy_out):
                self._copy_out.wait_event(slot.forward_ends)
                slot.copy_out_begins.record()
                for (_, places), values in zip(runs, converted, strict=True):
                    for place, value in zip(places, values, strict=True):
                        place.copy_(value, non_blocking=True)
                flags = slot.flags(count)
                flags.copy_(finite, non_blocking=True)
                slot.copy_out_ends.record()
        # The caching allocator knows tensors by the stream that made them and would give this memory away while it
        # is copied out: it is held until the batch is finished.
        return _Launched(slot, flags, held=[finite, *(value for values in converted for value in values)])

    def _collect(self, flight: _Launched) -> Finished:
        slot = flight.slot
        slot.copy_out_ends.synchronize()
        flight.held.clear()
        return Finished(
            finite=tuple(flight.flags.tolist()),
            copy_in=slot.copy_in_begins.elapsed_time(slot.copy_in_ends) / 1000,
            forward=slot.forward_begins.elapsed_time(slot.forward_ends) / 1000,
            copy_out=slot.copy_out_begins.elapsed_time(slot.copy_out_ends) / 1000,
        )

    def _settle(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


class _Slot:
    """Events and staging memory of one batch in flight; made with its device current."""

    def __init__(self) -> None:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]  # type: ignore[no-untyped-call]
        self.copy_in_begins, self.copy_in_ends, self.forward_begins, self.forward_ends, self.copy_out_begins = events
        # The one that the host waits for: without spinning on a core that a frontend could use.
        self.copy_out_ends = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._pixels = torch.empty(0, dtype=torch.uint8)
        self._flags = torch.empty(0, dtype=torch.bool)

    def pixels(self, nbytes: int, device: torch.device) -> Tensor:
        """[nbytes] uint8 on the device."""
        if self._pixels.numel() < nbytes:
            self._pixels = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is taken
            self._pixels = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._pixels[:nbytes]

    def flags(self, count: int) -> Tensor:
        """[count] bool in page-locked memory."""
        if self._flags.numel() < count:
            self._flags = torch.empty(count, dtype=torch.bool, pin_memory=True)
        return self._flags[:count]


@dataclass(frozen=True, slots=True)
class _Launched:
    slot: _Slot
    flags: Tensor
    held: list[Tensor]
