"""An encoded image of a request, and how it is to be read."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images import cost, decode


class File(NamedTuple):
    """`field` names it in errors. Methods may be called from any thread."""

    data: bytes | memoryview
    max_pixels: int
    apply_exif_orientation: bool
    field: str

    def cost(self) -> cost.Cost:
        """As `cost.cost_of` tells it."""
        try:
            return cost.cost_of(
                self.data, max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.blamed(error) from None

    def probe(self) -> tuple[int, int]:
        """As `decode.probe` does."""
        try:
            return decode.probe(
                bytes(self.data), max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.blamed(error) from error.__cause__

    def decode(self) -> Image.Image:
        """As `decode.decode` does."""
        try:
            return decode.decode(
                bytes(self.data), max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.blamed(error) from error.__cause__

    def blamed(self, error: InvalidInput) -> InvalidInput:
        """`error`, about this file where it does not say what it is about."""
        error.field = error.field or self.field
        return error
