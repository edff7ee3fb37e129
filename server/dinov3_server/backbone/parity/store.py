"""Stores results of parity checks in files, so that a restart need not compare again.

A file's name is a hash of the inputs of its check, and the file repeats them. Files are written atomically, so reading
needs no lock. The lock is for comparing: of several workers or replicas one compares and the others read its result.
With an unusable folder every start compares again; nothing else is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dinov3_server.errors import StorageError
from dinov3_server.models.interface import OutputParity, ParityCheck
from dinov3_server.storage import locked, write_atomic

log = logging.getLogger(__name__)


class StoredResult(NamedTuple):
    """A parity check, and the rounding error that it is judged by.

    `rounding` compares Meta's code in the serving dtype with itself in float32; it is empty if that dtype is float32.
    """

    parity_check: ParityCheck
    rounding: tuple[OutputParity, ...]


class ParityStore:
    """The file of one parity check in `folder`; `inputs` is everything that its result depends on."""

    def __init__(self, folder: Path, inputs: Mapping[str, str | int]) -> None:
        self._inputs = dict(inputs)
        key = hashlib.sha256(json.dumps(self._inputs, sort_keys=True).encode()).hexdigest()[:32]
        self.path = folder / f"{key}.json"

    def read(self) -> StoredResult | None:
        """Return the stored result, None if there is none or it cannot be read."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): the features are compared again", self.path, error.strerror)
            return None
        try:
            return _parse(json.loads(data), self._inputs)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s is not a valid result (%s): the features are compared again", self.path, error)
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait while another process runs the same check. Continue without a lock if the folder cannot be written."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path.with_suffix(".lock"), "comparing with Meta's code"))
            except StorageError as error:
                log.warning("the parity check will not be stored, so every start will compare again: %s", error)
            yield

    def write(self, result: StoredResult) -> None:
        content = {
            "inputs": self._inputs,
            "parity_check": asdict(result.parity_check),
            "rounding": [asdict(output) for output in result.rounding],
        }
        try:
            write_atomic(self.path, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
        except StorageError as error:
            log.warning("the parity check is not stored, so every start compares again: %s", error)


def _parse(content: Any, inputs: Mapping[str, str | int]) -> StoredResult:
    """Parse a file's content. Raises ValueError, TypeError or KeyError if `write` did not write it for `inputs`."""
    if content["inputs"] != inputs:
        raise ValueError("its inputs are others")
    stored = dict(content["parity_check"])
    outputs = _parse_outputs(stored.pop("outputs"))
    if not isinstance(stored["verified"], bool) or not all(
        isinstance(stored[name], str) for name in ("reason", "upstream_revision", "time", "not_covered")
    ):
        raise ValueError("a field has the wrong type")
    return StoredResult(ParityCheck(outputs=outputs, **stored), _parse_outputs(content["rounding"]))


def _parse_outputs(stored: Any) -> tuple[OutputParity, ...]:
    return tuple(
        OutputParity(each["output"], each["dtype"], float(each["least_cosine"]), float(each["relative_error"]))
        for each in stored
    )
