"""Decode processes: the same pixels and errors as in this process, limits, and kills at any time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from PIL import Image

from dinov3_server.errors import InvalidInput, Unavailable
from dinov3_server.images import decode_process, decoders
from dinov3_server.images.cost import Cost, cost_of
from dinov3_server.images.decode import File
from dinov3_server.images.decoders import Decoders
from dinov3_server.images.preprocess import transform_into
from dinov3_server.signals import HANDLED
from dinov3_serving.images import Box, RowSpec, Transform
from tests.server.images.files import encode, photo
from tests.server.images.hostile import jpeg_scans, lossless_webp
from tests.server.images.test_damaged import SEEDS
from tests.support.processes import children, resident_bytes
from tests.support.waiting import until_async

MAX_PIXELS = 100_000_000

# Warning filters that decode.py sets on import, which pytest replaces for every test.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
AS_IS = Transform(None, "bilinear")
SMALL = Transform((16, 32), "bicubic")
# Takes seconds.
LONG = jpeg_scans(190, 9_000)


def running() -> set[int]:
    return children(decode_process.__name__)


@pytest.fixture
async def pool() -> AsyncIterator[Decoders]:
    assert not running()
    pool = Decoders(2)
    yield pool
    pool.close()
    assert not running()


def file(data: bytes, *, upright: bool = False) -> File:
    return File(data, MAX_PIXELS, upright)


async def written(pool: Decoders, asked: File, *transforms: Transform, cost: Cost | None = None) -> list[bytes]:
    known = cost or cost_of(asked).with_transforms(transforms)
    sizes = [each.size or (each.crop[2:] if each.crop else (known.height, known.width)) for each in transforms]
    outs = [bytearray(height * width * 3) for height, width in sizes]
    rows = [RowSpec(view, f"images[3].views[{view}]", each, None) for view, each in enumerate(transforms)]
    await pool.write(asked, known, rows, [memoryview(out) for out in outs])
    return [bytes(out) for out in outs]


def expected(asked: File, *transforms: Transform) -> list[bytes]:
    image = asked.decode()
    outs = []
    for each in transforms:
        height, width = each.size or (each.crop[2:] if each.crop else (image.height, image.width))
        outs.append(bytearray(height * width * 3))
        transform_into(image, each, memoryview(outs[-1]))
    return [bytes(out) for out in outs]


async def test_the_same_pixels_of_every_kind_of_file(pool: Decoders) -> None:
    crop = Transform((8, 8), "lanczos", Box(2, 3, 10, 12), flip=True)
    for data in SEEDS.values():
        for upright in (False, True):
            asked = file(data, upright=upright)
            assert await written(pool, asked, SMALL, crop) == expected(asked, SMALL, crop)
            assert await pool.read_size(asked, cost_of(asked)) == asked.read_size()
    assert len(running()) == 1  # one process served both


async def test_large_rows_and_files(pool: Decoders) -> None:
    asked = file(encode(photo(1500, 1600), "TIFF"))
    assert await written(pool, asked, AS_IS, AS_IS) == expected(asked, AS_IS, AS_IS)


@pytest.mark.parametrize("data", [SEEDS["tiff lzw"][:300], SEEDS["png"][:100], b"II*\0", lossless_webp(100, 200)])
async def test_the_same_words(pool: Decoders, data: bytes) -> None:
    with pytest.raises(InvalidInput) as here:
        file(data).decode()
    with pytest.raises(InvalidInput) as there:
        await written(pool, file(data), SMALL)
    assert str(there.value) == str(here.value)
    assert await written(pool, file(SEEDS["png"]), SMALL) == expected(file(SEEDS["png"]), SMALL)
    assert len(running()) == 1  # an error does not end the process


async def test_a_box_beyond_the_picture(pool: Decoders) -> None:
    beyond = Transform((16, 16), "bilinear", Box(0, 0, 25, 10))
    with pytest.raises(InvalidInput, match="top \\+ height is 25, allowed are up to 24") as error:
        await written(pool, file(SEEDS["png"]), SMALL, beyond)
    assert error.value.field == "images[3].views[1].crop"


async def test_the_limit_of_memory(pool: Decoders) -> None:
    large = file(encode(Image.new("RGB", (3000, 3000)), "BMP"))
    with pytest.raises(InvalidInput, match="takes more than 1000000 bytes of memory, too many for its size"):
        await written(pool, large, SMALL, cost=Cost(3000, 3000, 1_000_000, False))
    assert await written(pool, large, SMALL) == expected(large, SMALL)
    assert len(running()) == 1


async def test_the_limit_of_time(pool: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "_SECONDS_PER_ROW", 0)
    monkeypatch.setattr(Cost, "seconds", 0)
    with pytest.raises(InvalidInput, match="takes more than 0 s of processor time to decode, too much for its size"):
        await written(pool, file(LONG), SMALL)
    assert not running()


async def test_a_process_that_is_killed_once_is_replaced(pool: Decoders) -> None:
    asked = file(SEEDS["tiff"])
    await written(pool, asked, SMALL)
    [first] = running()
    os.kill(first, signal.SIGKILL)
    assert await written(pool, asked, SMALL) == expected(asked, SMALL)
    assert running() != {first}


async def test_the_signals_of_a_service_manager_end_no_process(pool: Decoders) -> None:
    asked = file(SEEDS["tiff"])
    await written(pool, asked, SMALL)
    [first] = running()
    for number in HANDLED:
        os.kill(first, number)
    assert await written(pool, asked, SMALL) == expected(asked, SMALL)
    assert running() == {first}


async def test_a_file_that_decoders_die_of_fails_alone(pool: Decoders, caplog: pytest.LogCaptureFixture) -> None:
    task = asyncio.create_task(written(pool, file(LONG), SMALL))
    seen: set[int] = set()
    for _ in range(2):
        await until_async(lambda: any(resident_bytes(pid) > 100 << 20 for pid in running() - seen) or task.done())
        [pid] = running()
        seen.add(pid)
        os.kill(pid, signal.SIGSEGV)
    with pytest.raises(InvalidInput, match=r"cannot be decoded: it crashes decoders \(SIGSEGV\)"):
        await task
    assert len(caplog.records) == 2
    asked = file(SEEDS["tiff"])
    assert await written(pool, asked, SMALL) == expected(asked, SMALL)


async def test_a_caller_that_leaves_ends_the_process(pool: Decoders) -> None:
    outs = [memoryview(bytearray(b"\7" * 16 * 32 * 3))] * 2
    long = file(LONG)
    for what in (
        pool.write(long, cost_of(long), [RowSpec(0, "", SMALL, None)] * 2, outs),
        pool.read_size(long, cost_of(long)),
    ):
        task = asyncio.create_task(what)
        await until_async(running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not running()  # it has ended
    assert bytes(outs[0]) == b"\7" * 16 * 32 * 3
    asked = file(SEEDS["tiff"])
    assert await written(pool, asked, SMALL) == expected(asked, SMALL)


async def test_idle_processes_end(pool: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "IDLE_SECONDS", 0.01)
    asked = file(SEEDS["tiff"])
    for _ in range(2):
        assert await written(pool, asked, SMALL) == expected(asked, SMALL)
        await until_async(lambda: not running())


@pytest.mark.parametrize("executable", ["/nonexistent", "/bin/false"])
async def test_no_process_can_be_started(pool: Decoders, monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        for _ in range(3):
            with pytest.raises(Unavailable, match="no decode process can be started") as error:
                await written(pool, file(SEEDS["tiff"]), SMALL)
            assert error.value.retry_after
    assert await written(pool, file(SEEDS["tiff"]), SMALL)
