"""What client and server do with Pillow alike: truncated files, alpha over a color."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile

from dinov3_serving.images import Color


class _Flag(threading.local):
    """A value of ImageFile.LOAD_TRUNCATED_IMAGES that is true in some threads. Pillow only tests whether it is true."""

    allowed = False

    def __bool__(self) -> bool:
        return self.allowed or _otherwise


_flag = _Flag()
_otherwise = False


@contextmanager
def truncated_files(allowed: bool) -> Iterator[None]:
    """Within the context, let this thread decode truncated files if `allowed`, as Pillow does for a whole process.

    Other threads, and this one if not `allowed`, keep the value that the program has given the flag.
    """
    global _otherwise
    if not allowed:
        yield
        return
    current: object = ImageFile.LOAD_TRUNCATED_IMAGES
    if current is not _flag:
        _otherwise = bool(current)
        ImageFile.LOAD_TRUNCATED_IMAGES = _flag  # type: ignore[assignment]  # for good: threads come and go
    _flag.allowed = True
    try:
        yield
    finally:
        _flag.allowed = False


def over(image: Image.Image, background: Color | None) -> Image.Image:
    """Return `image` over a color, if it has transparent pixels; without a color, as it is."""
    if background is None or not image.has_transparency_data:
        return image
    # Pillow converts premultiplied grayscale only to LA.
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), rgba)
