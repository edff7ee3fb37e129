"""Who gets in: slots in the queue and a range of the arena, both taken before anything is decoded."""

from __future__ import annotations

import time

from dinov3_server.engine.arena import Arena
from dinov3_server.errors import InvalidInput, Overloaded
from dinov3_server.metrics import Metrics


class Lease:
    """Slots for images, and a range of the arena. `memory` is the whole arena: offsets index it."""

    def __init__(self, admission: Admission, images: int, offset: int, nbytes: int) -> None:
        self._admission = admission
        self._holders = 1  # the request, and every row that a worker may still touch
        self._released = False
        self.images = images
        self.memory = admission.arena.memory
        self.offset = offset
        self.nbytes = nbytes

    def release(self) -> None:
        """The request is through with its range. May be called twice."""
        if not self._released:
            self._released = True
            self.let_go(1)

    def hold(self, rows: int) -> None:
        self._holders += rows

    def let_go(self, rows: int) -> None:
        self._holders -= rows
        if not self._holders:
            self._admission.end(self)


class Admission:
    """The room that a frontend has for requests: `max_images`, and the bytes of its arena."""

    def __init__(self, arena: Arena, max_images: int, metrics: Metrics) -> None:
        self.arena = arena
        self.rate = Rate()
        self._max_images = max_images
        self._images = 0
        self._metrics = metrics
        self._show()

    def reserve(self, images: int, nbytes: int) -> Lease:
        """Take slots for `images` and `nbytes` of the arena, or say at once that there is no room.

        Raises:
            InvalidInput: it would not fit even an idle server.
            Overloaded: it does not fit now.
        """
        if images > self._max_images:
            raise InvalidInput(
                f"{images} images in one request, at most {self._max_images} are queued (max_queue_images); "
                "send them in several requests"
            )
        if nbytes > self.arena.nbytes:
            raise InvalidInput(
                f"pixels and features of this request take {nbytes} bytes, the whole arena has {self.arena.nbytes} "
                "(arena_bytes); send fewer images or ask for fewer outputs"
            )
        if self._images + images > self._max_images:
            raise Overloaded(
                f"{self._images} images are queued, {images} more would pass the limit of {self._max_images}",
                reason="queue",
                retry_after=self.rate.seconds_for(self._images),
            )
        offset = self.arena.allocate(nbytes)
        if offset is None:
            raise Overloaded(
                f"no range of {nbytes} bytes is free in the arena ({self.arena.used_bytes} of {self.arena.nbytes} "
                "bytes are in use)",
                reason="arena",
                retry_after=self.rate.seconds_for(self._images),
            )
        self._images += images
        self._show()
        return Lease(self, images, offset, nbytes)

    def end(self, lease: Lease) -> None:
        """Called by the lease, once nobody holds it."""
        self.arena.free(lease.offset)
        self._images -= lease.images
        self._show()

    def _show(self) -> None:
        used = self.arena.used_bytes
        self._metrics.arena_bytes.set(used, "used")
        self._metrics.arena_bytes.set(self.arena.nbytes - used, "free")


class Rate:
    """Images a second, smoothed, to tell a refused caller when it is worth another try."""

    def __init__(self) -> None:
        self._rate = 0.0
        self._count = 0
        self._since = time.monotonic()

    def add(self, images: int) -> None:
        self._count += images
        elapsed = time.monotonic() - self._since
        if elapsed >= 1.0:
            self._rate = self._count / elapsed if not self._rate else 0.5 * (self._rate + self._count / elapsed)
            self._count, self._since = 0, self._since + elapsed

    def seconds_for(self, images: int) -> float:
        return min(max(0.5 * images / self._rate, 0.05), 5.0) if self._rate else 0.2
