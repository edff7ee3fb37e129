"""The errors of extractions."""

from __future__ import annotations

from dinov3_client._errors import Dinov3Error


class ExtractionError(Dinov3Error):
    """A folder of features cannot be used: it is of another extraction, unfinished, damaged or in use."""


class FolderInUse(ExtractionError):
    """Another process writes to the folder."""


class SourceError(ValueError):
    """The images of an extraction cannot be listed."""


class StoreError(OSError):
    """A file at a URL cannot be read: errno, words, and as `filename` the URL without credentials."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class TooLarge(Exception):
    """A file is too large for a request."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size
