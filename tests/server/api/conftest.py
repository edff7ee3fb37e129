"""Fixtures of the tests of the API."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from dinov3_server.images.decode import File


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each file is decoded."""
    counter = Counter[bytes]()
    real = File.decode

    def counted(file: File) -> Image.Image:
        counter[bytes(file.data)] += 1
        return real(file)

    monkeypatch.setattr(File, "decode", counted)
    return counter
