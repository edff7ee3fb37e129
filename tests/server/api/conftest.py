"""Fixtures of the tests of the API."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from PIL import Image

from dinov3_server.images import decode


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each file is decoded."""
    counter = Counter[bytes]()
    real = decode.decode

    def counted(data: bytes, **options: Any) -> Image.Image:
        counter[data] += 1
        return real(data, **options)

    monkeypatch.setattr(decode, "decode", counted)
    return counter
