"""What `prepare` finds or fetches, and its errors if several things are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError, Unreachable, UpstreamCodeError
from dinov3_server.models.interface import Provisioned
from dinov3_server.provision import vendor
from dinov3_server.provision.prepare import checkout_folder, prepare


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"not looked into")
    return path


@pytest.fixture
def vendored(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record the folders that code is fetched into, without fetching."""
    folders: list[Path] = []
    monkeypatch.setattr(vendor, "vendor", lambda url, revision, target, *, offline: folders.append(target))
    return folders


def settings(tmp_path: Path, **others: object) -> Settings:
    return Settings(cache_dir=str(tmp_path / "cache_dir"), **others)  # type: ignore[arg-type]


def test_code_and_weights(tmp_path: Path, weights: Path, vendored: list[Path]) -> None:
    given = settings(tmp_path, weights=str(weights))
    found, seconds = prepare(given)
    checkout = tmp_path / "cache_dir" / "upstream" / given.upstream_revision
    assert found == Provisioned(str(weights), "mine.safetensors", given.upstream_revision, str(checkout))
    assert vendored == [checkout]
    assert list(seconds) == ["vendor", "weights"]


def test_the_checkout_may_be_in_another_folder(tmp_path: Path) -> None:
    assert checkout_folder(settings(tmp_path, upstream_dir="/srv/code")) == Path("/srv/code")


@pytest.mark.parametrize(
    ("others", "absent"),
    [
        ({"weights": "random:0"}, "the weights are random"),
        ({"parity_check": False}, "the setting `parity_check` is false"),
    ],
)
def test_code_that_is_not_needed_is_not_fetched(
    tmp_path: Path, weights: Path, vendored: list[Path], others: dict[str, object], absent: str
) -> None:
    found, _ = prepare(settings(tmp_path, **{"weights": str(weights), **others}))
    assert (found.checkout, found.unavailable_reason) == (None, absent)
    assert vendored == []


@pytest.mark.parametrize("others", [{"weights": "random:0"}, {"parity_check": False}])
def test_metas_modules_need_their_code(
    tmp_path: Path, weights: Path, vendored: list[Path], others: dict[str, object]
) -> None:
    found, _ = prepare(settings(tmp_path, **{"weights": str(weights), "backbone": "reference", **others}))
    assert found.checkout == str(vendored[0])


def test_offline_the_features_are_served_unverified(tmp_path: Path, weights: Path) -> None:
    found, _ = prepare(settings(tmp_path, weights=str(weights), offline=True))
    assert found.checkout is None
    assert "`offline` forbids fetching it" in found.unavailable_reason
    with pytest.raises(Unreachable, match="needed is commit 6876159"):
        prepare(settings(tmp_path, weights=str(weights), offline=True, backbone="reference"))


def test_unreachable_code_is_an_error_that_says_what_to_do(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Unreachable("no route to the code")

    monkeypatch.setattr(vendor, "vendor", fail)
    with pytest.raises(Unreachable) as one:
        prepare(settings(tmp_path, weights=str(weights)))
    assert str(one.value).startswith("no route to the code\nOr serve without the parity check")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # and the weights cannot be had either: one error says both
    with pytest.raises(Unreachable) as both:
        prepare(settings(tmp_path, model="vitb16"))
    assert "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth" in str(both.value)
    assert "no route to the code" in str(both.value)
    assert "dinov3-server prepare --model vitb16 --cache-dir FOLDER" in str(both.value)


def test_wrong_code_is_reported_before_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UpstreamCodeError("it is modified")

    monkeypatch.setattr(vendor, "vendor", fail)
    with pytest.raises(UpstreamCodeError, match="it is modified"):
        prepare(settings(tmp_path, model="vitb16", offline=True))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("/nowhere/weights.pth", "no folder /nowhere"),
        ("file:///nowhere/weights.pth", "there is no such file on this machine"),
        ("s3://bucket/weights.pth", "allowed are URLs that begin with"),
    ],
)
def test_a_wrong_path_is_named_before_code_is_fetched(
    tmp_path: Path, vendored: list[Path], weights: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(settings(tmp_path, weights=weights))
    assert vendored == []
