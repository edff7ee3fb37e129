"""Certificates kept in files, so that a restart does not prove again what was proven.

A parity check's file is named after what it is about, and says it too. Files are written whole, so reading needs no
lock; the lock is for proving, so that of several workers or replicas one proves and the others read. A folder that
cannot be used costs the time of a proof at every start, and nothing else.
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


class Kept(NamedTuple):
    """A parity check, and what it is judged by: how near Meta's own code in the serving dtype is to itself in float32.

    `rounding` is empty where the serving dtype is float32.
    """

    parity_check: ParityCheck
    rounding: tuple[OutputParity, ...]


class ParityStore:
    """The place of one parity check in `folder`; `about` is everything that its figures depend on."""

    def __init__(self, folder: Path, about: Mapping[str, str | int]) -> None:
        self._about = dict(about)
        key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:32]
        self.path = folder / f"{key}.json"

    def read(self) -> Kept | None:
        """What is kept; None where that is nothing, or cannot be read."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): the features are compared again", self.path, error.strerror)
            return None
        try:
            return _parse(json.loads(data), self._about)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s is no parity check of this (%s): the features are compared again", self.path, error)
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait while another process proves the same; go on without, where the folder cannot be written."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.path.with_suffix(".lock"), "comparing with Meta's code"))
            except StorageError as error:
                log.warning("the parity check will not be kept, so every start will compare again: %s", error)
            yield

    def write(self, kept: Kept) -> None:
        content = {
            "about": self._about,
            "parity_check": asdict(kept.parity_check),
            "rounding": [asdict(proof) for proof in kept.rounding],
        }
        try:
            write_atomic(self.path, json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
        except StorageError as error:
            log.warning("the parity check is not kept, so every start compares again: %s", error)


def _parse(content: Any, about: Mapping[str, str | int]) -> Kept:
    """Raises ValueError, TypeError or KeyError for anything but what `write` writes."""
    if content["about"] != about:
        raise ValueError("it is about something else")
    stored = dict(content["parity_check"])
    outputs = _proofs(stored.pop("outputs"))
    if not isinstance(stored["verified"], bool) or not all(
        isinstance(stored[name], str) for name in ("reason", "revision", "time", "not_covered")
    ):
        raise ValueError("a field is not what it should be")
    return Kept(ParityCheck(outputs=outputs, **stored), _proofs(content["rounding"]))


def _proofs(stored: Any) -> tuple[OutputParity, ...]:
    return tuple(
        OutputParity(each["output"], each["dtype"], float(each["least_cosine"]), float(each["relative_error"]))
        for each in stored
    )
