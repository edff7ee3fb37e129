"""An encoded image of a request."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from dinov3_server.errors import InvalidInput
from dinov3_server.images import cost, decode


class File(NamedTuple):
    """An encoded file, with the options for decoding it. `field` names it in errors. Thread-safe."""

    data: bytes | memoryview
    max_pixels: int
    apply_exif_orientation: bool
    field: str

    def cost(self) -> cost.Cost:
        """Return the cost of decoding (`cost.cost_of`)."""
        try:
            return cost.cost_of(
                self.data, max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.with_field(error) from None

    def read_size(self) -> tuple[int, int]:
        """Return (height, width), from the header (`decode.read_size`)."""
        try:
            return decode.read_size(
                bytes(self.data), max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.with_field(error) from error.__cause__

    def decode(self) -> Image.Image:
        """Decode the file (`decode.decode`)."""
        try:
            return decode.decode(
                bytes(self.data), max_pixels=self.max_pixels, apply_exif_orientation=self.apply_exif_orientation
            )
        except InvalidInput as error:
            raise self.with_field(error) from error.__cause__

    def with_field(self, error: InvalidInput) -> InvalidInput:
        """Set the error's field to that of this file, unless it has one."""
        error.field = error.field or self.field
        return error
