"""The errors that checks of a request raise, in the server and in the client's fake server."""

from __future__ import annotations

import traceback
from typing import TypeVar

E = TypeVar("E", bound=Exception)


class ServingError(Exception):
    """A request, or one image of it, gets no features. `status` is the name of the gRPC status code."""

    status = "UNKNOWN"


class InvalidInput(ServingError):
    """The request is invalid.

    `field` is the protobuf path of the invalid field (`images[3].encoded`), relative to the request.
    """

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ModelMismatch(ServingError):
    """The requested model is not the one that is served."""

    status = "FAILED_PRECONDITION"


def without_traceback(error: E) -> E:
    """Return `error` to be stored until the answer is built, without frames that refer to pixels."""
    # Since Python 3.12 a frame of contextlib is in a reference cycle with the traceback that passed through it. If the
    # frames were not cleared, they and their views of the pixels would live until the next garbage collection.
    traceback.clear_frames(error.__traceback__)
    error = error.with_traceback(None)
    error.__cause__ = error.__context__ = None
    return error
