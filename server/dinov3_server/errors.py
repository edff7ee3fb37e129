"""The errors of requests, with their gRPC statuses, and of the start-up, with their exit codes.

    ServingError                 an error of a request; has a gRPC status
      InvalidInput               INVALID_ARGUMENT, names the invalid field
      Overloaded                 RESOURCE_EXHAUSTED, with the time after which to retry
      Unavailable                UNAVAILABLE, with the time after which to retry
      DeadlineExceeded           DEADLINE_EXCEEDED, says where the request waited
      Unauthenticated            UNAUTHENTICATED
      ModelMismatch              FAILED_PRECONDITION
      InternalError              INTERNAL, with an id that is in the log, too
    StartupError             2   the process cannot start, and exits with `exit_code`
      ConfigError            2   an invalid flag, environment variable or YAML key
      Unreachable            3   something is missing and cannot be fetched now; trying again later may help
      AccessRefused          4   a server refuses access: a license, a token, an expired signed URL
      CheckpointError        5   unusable weights: damaged, of another model, or with an unexpected hash
      StorageError           6   an unusable folder or disk: read-only, full, no permission
      UpstreamCodeError      7   Meta's code cannot be vendored, or its checkout is not as expected
      ParityError            8   the served features are not those of Meta's code

Only `api/status.py` turns errors of requests into statuses; only `cli.py` turns errors of the start-up into exit codes
(docs/provisioning.md lists them).
"""

from __future__ import annotations

import secrets

# The client's fake server raises these too.
from dinov3_serving.errors import InvalidInput as InvalidInput
from dinov3_serving.errors import ModelMismatch as ModelMismatch
from dinov3_serving.errors import ServingError as ServingError


class Overloaded(ServingError):
    """There is no room, or no time before the deadline. `reason` is the label in `dinov3_refused_requests_total`."""

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, reason: str, retry_after: float = 0.1) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class Unavailable(ServingError):
    """The server is starting or draining, or has no worker in time."""

    status = "UNAVAILABLE"

    def __init__(self, message: str, reason: str = "unavailable", retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class DeadlineExceeded(ServingError):
    """The deadline passed; the message says where the request waited."""

    status = "DEADLINE_EXCEEDED"


class Unauthenticated(ServingError):
    """The call has no credentials, or wrong ones."""

    status = "UNAUTHENTICATED"


class InternalError(ServingError):
    """The server is at fault. The client gets `message` and an id; the raising code logs the same id with the cause."""

    status = "INTERNAL"

    def __init__(self, message: str) -> None:
        self.error_id = secrets.token_hex(4)
        super().__init__(f"{message} (error id {self.error_id}, the server's log has the cause)")


class StartupError(Exception):
    """The process cannot start; the message is for the operator."""

    exit_code = 2


class ConfigError(StartupError):
    """A setting is invalid. The message says what was given, where, and what is allowed."""


class Unreachable(StartupError):
    """Something is missing and cannot be fetched now: no network, a failing server, or `offline` forbids it."""

    exit_code = 3


class AccessRefused(StartupError):
    """A server refuses access. The message says which, and how to get access."""

    exit_code = 4


class CheckpointError(StartupError):
    """A weights file is unusable. The message says which file, which key, and what was expected."""

    exit_code = 5


class StorageError(StartupError):
    """A folder or disk is unusable: read-only, full, no permission."""

    exit_code = 6


class UpstreamCodeError(StartupError):
    """Meta's code cannot be vendored, or its checkout is not as expected."""

    exit_code = 7


class ParityError(StartupError):
    """The served features are not those of Meta's code on the same weights, or they could not be compared."""

    exit_code = 8
