"""docs/security.md names every setting of a limit, and has the numbers of the fixed limits."""

from __future__ import annotations

import pytest

from dinov3_server.config.settings import SETTINGS
from dinov3_server.images import cost
from dinov3_server.processes import http_endpoints
from dinov3_serving.v1.images import LARGEST_FLOAT
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


@pytest.mark.parametrize("name", [each.name for each in SETTINGS if each.topic in ("limits", "security")])
def test_every_setting_is_named(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize(
    "row",
    [
        f"| {http_endpoints.MAX_CONNECTIONS}, {http_endpoints.CONNECTION_SECONDS:g} s, 16 KiB |",
        f"| NaN, or beyond {LARGEST_FLOAT:g} |",
        f"| {cost.MAX_SCANS}, and {16 * cost.MAX_SCANS} segments |",
        f"ones of {cost.PLAIN_PIXELS:,} pixels and {cost.PLAIN_BYTES >> 20} MiB |",
    ],
)
def test_numbers_are_those_of_the_code(row: str) -> None:
    assert row in PAGE
