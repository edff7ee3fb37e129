"""The errors of extractions."""

from __future__ import annotations

from dinov3_client._errors import Dinov3Error


class ExtractionError(Dinov3Error):
    """A folder of features cannot be used: it is of another extraction, unfinished, damaged or in use."""


class FolderInUse(ExtractionError):
    """Another process writes to the folder."""


class SourceError(ValueError):
    """The images of an extraction cannot be listed."""
