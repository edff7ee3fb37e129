"""Limits of decoding: decodes end with their call, and pictures stay within the memory budget."""

from __future__ import annotations

import asyncio
import time

import pytest

from dinov3_server.api.budget import ByteBudget, Quota
from dinov3_server.engine.shares import ANONYMOUS
from dinov3_server.errors import DeadlineExceeded, Overloaded
from dinov3_server.images import decode_process
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from tests.server.api.rig import AS_IS, FakeEngine, encoded, extraction, picture, request_memory, serving
from tests.server.images.files import encode, photo
from tests.server.images.hostile import jpeg_scans, one_bit_png
from tests.support.processes import children, most_resident_bytes, resident_bytes
from tests.support.waiting import LIMIT, until_async

CLS = pb.Outputs(cls=True)
SCANS = jpeg_scans(190, 5000)
# Decoded once and then resized 400 times, which takes more than half a minute anywhere.
LONG = pb.ExtractRequest(
    images=[
        pb.Image(encoded=SCANS, views=[pb.View(horizontal_flip=bool(view % 2)) for view in range(400)]),
        encoded(picture(16, 16)),
    ],
    preprocessing=pb.Preprocessing(size=pb.Size(height=16, width=16), interpolation=pb.INTERPOLATION_LANCZOS),
    outputs=CLS,
)


def running() -> set[int]:
    return children(decode_process.__name__)


async def test_a_deadline_ends_a_decode() -> None:
    engine, metrics = FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    task = asyncio.create_task(service.extract(LONG, time.monotonic() + 1.0, ANONYMOUS, request_memory()))
    with pytest.raises(DeadlineExceeded, match="while the images of the request were being decoded"):
        await asyncio.wait_for(task, LIMIT)
    assert engine.untouched()
    assert not running()
    assert metrics.snapshot().series["dinov3_images_total"] == {("expired",): (401.0,)}
    service.decode_pool.close()


async def test_a_caller_that_leaves_ends_a_decode() -> None:
    engine, metrics = FakeEngine(), Metrics()
    service = extraction(engine, metrics)
    task = asyncio.create_task(service.extract(LONG, None, ANONYMOUS, request_memory()))
    await until_async(running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, LIMIT)
    assert engine.untouched()
    assert not running()
    assert metrics.snapshot().series["dinov3_images_total"] == {("cancelled",): (401.0,)}
    service.decode_pool.close()


async def test_a_drain_does_not_wait_for_a_decode() -> None:
    async with serving() as rig:
        call = rig.stub.Extract(LONG)
        await until_async(running)
        await asyncio.wait_for(rig.server.drain(0), LIMIT)
        assert rig.engine.untouched()
        assert not running()
        call.cancel()


async def test_files_for_threads_and_for_processes_in_one_request() -> None:
    """Each row is at its place, and invalid files fail alone."""
    pixels = [picture(32, 32, seed) for seed in range(6)]
    formats = ("PNG", "TIFF", "BMP", "TIFF", "PNG", "WEBP")
    files = [encode(*pair, lossless=True) for pair in zip(pixels, formats, strict=True)]
    images = [pb.Image(encoded=file) for file in files]
    broken = pb.Image(encoded=b"II*\0" + bytes(20))
    refused = pb.Image(encoded=jpeg_scans(500, 100))
    async with serving() as rig:
        for preprocessing in (AS_IS, pb.Preprocessing(size=pb.Size(height=32, width=32))):
            request = pb.ExtractRequest(images=[*images, broken, refused], preprocessing=preprocessing, outputs=CLS)
            mixed = await rig.stub.Extract(request)
            raw = pb.ExtractRequest(images=[encoded(p) for p in pixels], preprocessing=preprocessing, outputs=CLS)
            plain = await rig.stub.Extract(raw)
            unreadable, too_much = mixed.errors
            assert (unreadable.image_index, too_much.image_index) == (6, 7)
            assert "the TIFF file of 24 bytes has no readable header" in unreadable.status.message
            assert "takes too much work: it has more than 200 scans" in too_much.status.message
            size = len(plain.blocks[0].cls.data)
            assert mixed.blocks[0].cls.data[:size] == plain.blocks[0].cls.data
        assert rig.server.budget.pictures.used == 0


async def test_a_picture_over_the_limit_fails_alone() -> None:
    engine, budget = FakeEngine(), ByteBudget(200 << 20, 8 << 20)
    service = extraction(engine, Metrics(), budget=budget)
    images = [pb.Image(encoded=one_bit_png(10_000)), encoded(picture(16, 16))]
    answer = pb.ExtractResponse.FromString(
        await service.extract(pb.ExtractRequest(images=images, outputs=CLS), None, ANONYMOUS, request_memory())
    )
    [error] = answer.errors
    assert error.image_index == 0
    assert "bytes for its pictures; allowed are" in error.status.message
    assert not running()
    service.decode_pool.close()


async def test_a_request_without_memory_in_time_is_refused_with_a_retry_delay() -> None:
    engine, budget = FakeEngine(), ByteBudget(200 << 20, 8 << 20)
    service = extraction(engine, Metrics(), budget=budget)
    held = budget.pictures.try_acquire(budget.pictures.limit)
    assert held
    for image in (encoded(picture(16, 16)), pb.Image(encoded=encode(photo(), "TIFF"))):
        request = pb.ExtractRequest(images=[image, image], outputs=CLS)
        with pytest.raises(Overloaded, match=r"no memory for .* bytes of pictures within"):
            await service.extract(request, time.monotonic() + 0.2, ANONYMOUS, request_memory())
        assert engine.untouched()
        assert not budget.pictures.waiters
    held.release()
    await service.extract(request, None, ANONYMOUS, request_memory())
    service.decode_pool.close()


async def test_many_large_pictures_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by the budget, and by the resident memory of the decode processes."""
    engine, budget = FakeEngine(), ByteBudget(700 << 20, 8 << 20)
    counted: list[int] = []
    add = budget.add

    def recorded_add(quota: Quota, nbytes: int) -> None:
        add(quota, nbytes)
        counted.append(budget.pictures.used)

    monkeypatch.setattr(budget, "add", recorded_add)
    monkeypatch.setattr("dinov3_server.api.budget.LONGEST_WAIT_SECONDS", LIMIT)
    service = extraction(engine, Metrics(), threads=4, budget=budget)
    bomb = one_bit_png(7000)  # 49 million pixels: 245 MB
    request = pb.ExtractRequest(images=[pb.Image(encoded=bomb)] * 2, outputs=CLS)
    tasks = [asyncio.create_task(service.extract(request, None, ANONYMOUS, request_memory())) for _ in range(4)]
    most_resident = 0
    while not all(task.done() for task in tasks):
        most_resident = max(most_resident, sum(map(resident_bytes, running())))
        await asyncio.sleep(0.005)
    for task in tasks:
        assert not pb.ExtractResponse.FromString(task.result()).errors
    assert 400 << 20 < max(counted) <= budget.pictures.limit
    assert most_resident < budget.pictures.limit + 4 * (48 << 20)  # and an interpreter each
    assert max(map(most_resident_bytes, running())) > 200 << 20
    assert budget.pictures.used == 0
    service.decode_pool.close()
