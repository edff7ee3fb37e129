"""The images of a call, read a window at a time, and the check of normalized pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from dinov3_client._images import LoadedImage
from dinov3_client._request import OnError
from dinov3_serving.model import ModelDescription

# The memory of the images that are read before they are sent; more are read when these are answered.
WINDOW_NBYTES = 64 * 2**20


class Reading:
    """Reads the images of a call. A call of any size holds one window of them, and its requests, in memory."""

    def __init__(self, source: Iterator[LoadedImage]) -> None:
        self._source = source
        self.images: list[LoadedImage] = []
        """Those of the window."""
        self.first = 0
        """The index of the window's first image within the call."""
        self.is_complete = False
        """Whether there are no images after the window."""

    def read(self) -> None:
        """Read the next window, which may be empty if it is the last. Raises what reading an image raises."""
        self.first += len(self.images)
        self.images = []
        nbytes = 0
        while nbytes < WINDOW_NBYTES:
            image = next(self._source, None)
            if image is None:
                self.is_complete = True
                return
            self.images.append(image)
            nbytes += image.loaded_nbytes


def check_range(
    images: Sequence[LoadedImage], first: int, model: ModelDescription, on_error: OnError
) -> list[LoadedImage]:
    """Return the images, with errors for floats that cannot be normalized pixels; warn of those that hardly are.

    Normalized pixels lie within about -2.2 to 2.7. Noise may go further; values of 0 to 255 go much further.
    Raises ValueError instead if `on_error` is "raise".
    """
    checked = list(images)
    floats = [
        place
        for place, image in enumerate(images)
        if isinstance(image.data, np.ndarray) and image.data.dtype == np.float32
    ]
    if not floats:
        return checked
    black, white = ([(value - mean) / std for mean, std in zip(model.mean, model.std, strict=True)] for value in (0, 1))
    taken = (
        "floating point is taken as normalized by the model's mean and std, so as values from "
        f"{min(black):.2f} (black) to {max(white):.2f} (white)"
    )
    ranges = {place: (float(np.min(images[place].data)), float(np.max(images[place].data))) for place in floats}
    for place, (least, most) in ranges.items():
        if least < 4 * min(black) or most > 4 * max(white):
            error = ValueError(
                f"images[{first + place}] has values from {least:.3g} to {most:.3g}; {taken}. Give pixels of 0 to 255 "
                "as uint8, or as (pixels / 255 - mean) / std"
            )
            if on_error == "raise":
                raise error
            checked[place] = images[place].failed(first + place, error)
    least, most = min(least for least, _ in ranges.values()), max(most for _, most in ranges.values())
    if 0 <= least < most <= 1:  # the range of photos before normalization, hardly ever after it
        # The same text for each call, so that Python shows it once.
        warnings.warn(f"all values of images are within 0 to 1; {taken}. Are these normalized?", stacklevel=2)
    return checked
