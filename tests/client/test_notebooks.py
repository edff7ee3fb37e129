"""What a notebook meets: event loops one after the other, representations, files of numpy."""

from __future__ import annotations

import asyncio
import io
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dinov3_client import AsyncClient, Client, ImageViews, Layer, Model, View
from dinov3_client.testing import MODEL, FakeServer, expected
from tests.client.adapters import EXACT, check, photos
from tests.support.waiting import LIMIT


def test_an_async_client_works_in_one_event_loop_after_the_other(server: FakeServer) -> None:
    client = AsyncClient(server.target, deadline=LIMIT)
    for index in range(3):
        check(asyncio.run(client.extract(photos(1, index), **EXACT)), photos(1, index))
        assert len(client._session._pools) == 1  # those of closed loops are gone
    asyncio.run(client.close())
    with pytest.raises(ValueError, match="this client is closed"):
        asyncio.run(client.model())


def test_an_async_client_works_in_several_event_loops_at_a_time(server: FakeServer) -> None:
    client = AsyncClient(server.target, deadline=LIMIT)
    together = threading.Barrier(3, timeout=LIMIT)

    async def use() -> None:
        for index in range(3):
            check(await client.extract(photos(1, index), **EXACT), photos(1, index))
            await asyncio.to_thread(together.wait)

    async def use_and_close() -> None:
        await use()
        await client.close()

    others = [threading.Thread(target=asyncio.run, args=(use(),)) for _ in range(2)]
    for thread in others:
        thread.start()
    asyncio.run(use_and_close())
    for thread in others:
        thread.join()


def test_closing_ends_the_connections_of_other_loops(server: FakeServer) -> None:
    client = AsyncClient(server.target, deadline=LIMIT)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(client.extract(photos(1), **EXACT), loop).result()
        asyncio.run(client.close())
        with pytest.raises(ValueError, match="this client is closed"):
            asyncio.run_coroutine_threadsafe(client.extract(photos(1), **EXACT), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_representations_of_images(client: Client) -> None:
    features = client.extract([photos(1)[0], b"no picture"], layers=[3], on_error="return", **EXACT)
    assert repr(features[0]) == (
        "<ImageFeatures of image 0, 32x48: cls [24], patches [6, 24], grid 2x3, layers [3], float32>"
    )
    assert repr(features[1]).startswith("<ImageFeatures of image 1: failed, the file of 10 bytes")
    views = client.extract(ImageViews(photos(1)[0], [View(), View(size=16)]), "cls", **EXACT)
    assert repr(views[1]) == "<ImageFeatures of image 0, view 1, 16x16: cls [24], grid 1x1, layers [], float32>"


def test_the_representation_of_a_model() -> None:
    text = repr(MODEL)
    assert text.startswith("<Model dinov3_vits16: ")
    assert "fingerprint f00d, 24 channels, 12 layers, patch 16, 4 registers" in text
    convnext: Model = replace(MODEL, layer_dims=(96, 192), layer_strides=(4, 8), random_weights=True)
    assert "random weights (" in repr(convnext)
    assert "96/192 channels, 2 layers, patch 4/8" in repr(convnext)


@pytest.mark.parametrize(("dtype", "to", "found"), [("bfloat16", None, "float32"), ("bfloat16", "float16", "float16")])
def test_arrays_for_files(client: Client, dtype: Any, to: Any, found: str) -> None:
    options: Any = {**EXACT, "dtype": dtype}
    features = client.extract(photos(2), ("cls", "registers"), layers=[Layer(-1, "patches")], **options)
    file = io.BytesIO()
    np.savez(file, **features.numpy(to))
    file.seek(0)
    loaded = np.load(file)
    assert sorted(loaded) == ["cls", "layer-1_patches", "registers"]
    assert {array.dtype.name for array in loaded.values()} == {found}
    np.testing.assert_allclose(loaded["cls"][0], expected(photos(1)[0], "cls"), rtol=0.01)
    assert all(array.flags.writeable for array in features.numpy().values())
    with pytest.raises(ValueError, match="dtype has 'bfloat16'; allowed are 'float32', 'float16', None"):
        features.numpy("bfloat16")  # type: ignore[arg-type]
