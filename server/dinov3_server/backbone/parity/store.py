"""Stores results of parity checks in files, so that a restart need not compare again.

A file's name is a hash of the inputs of its check, and the file repeats them; a digest of its content shows damage.
Files are written atomically, so reading needs no lock. The lock is for comparing: of several workers or replicas one
compares and the others read its result. With an unusable folder every start compares again; nothing else is lost.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from dinov3_server.errors import StorageError
from dinov3_server.models.interface import OutputParity, ParityCheck
from dinov3_server.storage import locked, write_atomic

log = logging.getLogger(__name__)


class ParityStore:
    """The file of one parity check in `folder`; `inputs` is everything that its result depends on."""

    def __init__(self, folder: Path, inputs: Mapping[str, str | int]) -> None:
        self._inputs = dict(inputs)
        key = hashlib.sha256(json.dumps(self._inputs, sort_keys=True).encode()).hexdigest()[:32]
        self.path = folder / f"{key}.json"

    def read(self) -> ParityCheck | None:
        """Return the stored result, None if there is none or it cannot be read."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s cannot be read (%s): the features are compared again", self.path, error.strerror)
            return None
        try:
            stored = json.loads(data)["parity_check"]
            outputs = tuple(OutputParity(**output) for output in stored["outputs"])
            parity_check = ParityCheck(**{**stored, "outputs": outputs})
            if data != self._content(parity_check):
                raise ValueError("its content was changed")
            return parity_check
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

    def write(self, parity_check: ParityCheck) -> None:
        try:
            write_atomic(self.path, self._content(parity_check))
        except StorageError as error:
            log.warning("the parity check is not stored, so every start compares again: %s", error)

    def _content(self, parity_check: ParityCheck) -> bytes:
        content = {"inputs": self._inputs, "parity_check": asdict(parity_check)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content | {"sha256": digest}, indent=2, sort_keys=True).encode() + b"\n"
