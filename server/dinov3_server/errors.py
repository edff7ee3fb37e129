"""Every error that a person can meet, and the status it has on the wire.

    ServingError                 of a request; has a gRPC status
      InvalidInput               INVALID_ARGUMENT, names the field at fault
      Overloaded                 RESOURCE_EXHAUSTED, with the time after which to try again
      Unavailable                UNAVAILABLE, likewise
      DeadlineExceeded           DEADLINE_EXCEEDED, says where the request waited
      Unauthenticated            UNAUTHENTICATED
      ModelMismatch              FAILED_PRECONDITION
      InternalError              INTERNAL, with an id that the log has too
    StartupError                 of the process: it says so and exits with `exit_code`, 2 where nothing else is said
      ConfigError            2   a flag, an environment variable or a YAML key
      Unreachable            3   something is missing and cannot be fetched now; trying again later may help
      AccessRefused          4   a server refuses: a licence, a token, a signed URL that has expired
      CheckpointError        5   weights that cannot be used: damaged, of another model, not what was promised
      StorageError           6   a folder or disk: read-only, full, no permission
      UpstreamCodeError      7   Meta's code cannot be vendored, or is not what it should be
      ParityError       8   the served features are not those of Meta's code

Only `api/status.py` turns the first kind into statuses; only `cli.py` turns the second into exit codes
(docs/provisioning.md lists them).
"""

from __future__ import annotations

import secrets


class ServingError(Exception):
    """A request (or one image of it) that gets no features.

    `status` is the name of the gRPC status code.
    """

    status = "UNKNOWN"


class InvalidInput(ServingError):
    """What was sent cannot be used as it is.

    `field` is the protobuf path of the field at fault (`images[3].encoded`), relative to the request.
    """

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Overloaded(ServingError):
    """There is no room, or no time before the deadline. `reason` is the label of `dinov3_refused_requests_total`."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, reason: str, retry_after: float = 0.1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Unavailable(ServingError):
    """Starting, draining, or no worker in time."""

    status = "UNAVAILABLE"

    def __init__(self, message: str, reason: str = "unavailable", retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class DeadlineExceeded(ServingError):
    """The deadline passed; the message says where the request waited."""

    status = "DEADLINE_EXCEEDED"


class Unauthenticated(ServingError):
    """No credentials, or wrong ones."""

    status = "UNAUTHENTICATED"


class ModelMismatch(ServingError):
    """The model asked for is not the one that is served."""

    status = "FAILED_PRECONDITION"


class InternalError(ServingError):
    """Our fault. The wire gets `message` and an id; whoever raises it logs the same id with the cause."""

    status = "INTERNAL"

    def __init__(self, message: str) -> None:
        self.error_id = secrets.token_hex(4)
        super().__init__(f"{message} (error id {self.error_id}, the server's log has the cause)")


class StartupError(Exception):
    """The process cannot start; the message is for the person at the terminal."""

    exit_code = 2


class ConfigError(StartupError):
    """A setting that cannot be used: what was given, where, and what is allowed."""


class Unreachable(StartupError):
    """What is missing cannot be fetched now: no network, a server that fails, or `offline` forbids it."""

    exit_code = 3


class AccessRefused(StartupError):
    """A server refuses what was asked for: which, and how access is got."""

    exit_code = 4


class CheckpointError(StartupError):
    """A weights file that cannot be used: which file, which key, and what was expected."""

    exit_code = 5


class StorageError(StartupError):
    """A folder or disk that cannot be used: read-only, full, no permission."""

    exit_code = 6


class UpstreamCodeError(StartupError):
    """Meta's code cannot be vendored, or its checkout is not what it should be."""

    exit_code = 7


class ParityError(StartupError):
    """The served features are not those of Meta's code on the same weights, or that could not be found out."""

    exit_code = 8
