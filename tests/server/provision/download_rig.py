"""Download in tests, with a clock that only sleeping moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from dinov3_server.provision.download import Expected, Timing, download

DATA = Random(4).randbytes(200_000)
SECRET = "Policy=eyJTdGF0ZW1lbnQiOl&Signature=c2lnbmVk~a-b_c&Key-Pair-Id=K15QRJLYKIFSLZ"
NOTHING = Expected()
NO_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass
class Rig:
    """Downloads to `target`, and a record of the waits."""

    target: Path
    waits: list[float] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)
    now: float = 0.0

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def about(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def download(
        self,
        url: str,
        expected: Expected = NOTHING,
        *,
        headers: Mapping[str, str] | None = None,
        stall_seconds: float | None = 20.0,
    ) -> str:
        timing = Timing(clock=lambda: self.now, sleep=self.sleep, stall_seconds=stall_seconds)
        return download(
            url,
            self.target,
            expected,
            headers=headers or {},
            on_progress=self.reports.append,
            timing=timing,
        )

    def fails(
        self, error: type[Exception], url: str, expected: Expected = NOTHING, *, stall_seconds: float | None = 20.0
    ) -> str:
        """Return the message of the error, after checking that the target is unchanged."""
        before = self.target.read_bytes() if self.target.exists() else None
        with pytest.raises(error) as raised:
            self.download(url, expected, stall_seconds=stall_seconds)
        assert type(raised.value) is error
        assert (self.target.read_bytes() if self.target.exists() else None) == before
        return str(raised.value)

    def left(self) -> list[str]:
        """List the files in the target's folder."""
        return sorted(path.name for path in self.target.parent.iterdir())


def rig(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Rig:
    """Return a rig with a folder that does not exist yet, and no proxy."""
    for name in NO_PROXIES:
        monkeypatch.delenv(name, raising=False)
    return Rig(folder / "cache_dir" / "weights" / "model.pth")
