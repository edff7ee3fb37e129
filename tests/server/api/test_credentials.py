"""Tokens and TLS files that change while the server runs, and certificates that expire."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from dinov3_server.api import credentials, server, tls
from dinov3_server.api.tls import Lifetime, lifetime
from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError
from dinov3_server.metrics import Metrics
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1 import feature_service_pb2_grpc as pb_grpc
from tests.server.api.rig import CERTIFICATES, REQUEST, Rig, bearer, failure_of, serving
from tests.support.waiting import until_async

FIRST = (CERTIFICATES / "localhost.pem", CERTIFICATES / "localhost.key")
RENEWED = (Path(__file__).parent / "renewed.pem", Path(__file__).parent / "renewed.key")
DAY = 86400.0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RELOAD_SECONDS", 0.01)


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def rename_over(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.write_bytes(content)
    draft.rename(path)


def swap_links(path: Path, content: bytes) -> None:
    """Replace a file as Kubernetes does: it is a link through ..data, which is then linked to a new folder."""
    folder = path.parent / f"..{len(list(path.parent.iterdir()))}"
    folder.mkdir()
    (folder / path.name).write_bytes(content)
    (path.parent / "..tmp").symlink_to(folder.name)
    (path.parent / "..tmp").rename(path.parent / "..data")
    if not path.is_symlink():
        path.unlink(missing_ok=True)
        path.symlink_to(Path("..data") / path.name)


def known(rig: Rig) -> list[bytes]:
    tokens = rig.server.credentials.tokens
    assert tokens is not None
    return tokens.value


async def is_refused(rig: Rig, token: str) -> bool:
    call = rig.stub.Extract(REQUEST, metadata=bearer(token))
    return {grpc.StatusCode.UNAUTHENTICATED: True, grpc.StatusCode.OK: False}[await call.code()]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("replace", [overwrite, rename_over, swap_links])
async def test_tokens_are_reloaded_when_their_file_changes(tmp_path: Path, replace: Any) -> None:
    path = tmp_path / "tokens"
    replace(path, b"old\nkept\n")
    async with serving(token_file=str(path)) as rig:
        assert [await is_refused(rig, token) for token in ("old", "kept", "new")] == [False, False, True]
        replace(path, b"kept\nnew\n")
        await until_async(lambda: known(rig) == [b"kept", b"new"])
        assert [await is_refused(rig, token) for token in ("old", "kept", "new")] == [True, False, False]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", "pässword".encode(), None], ids=["empty", "not ASCII", "gone"])
async def test_an_invalid_token_file_leaves_the_old_tokens_in_use(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"old")
    async with serving(token_file=str(path)) as rig:
        assert rig.count("dinov3_reload_failed", "tokens") == 0
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        await until_async(lambda: rig.count("dinov3_reload_failed", "tokens") == 1)
        assert not await is_refused(rig, "old")
        rig.server.credentials.reload()
        [record] = [record for record in caplog.records if record.levelno == logging.ERROR]  # once, not at each check
        assert str(path) in record.message
        assert "stays in use" in record.message
        path.write_bytes(b"new")
        await until_async(lambda: rig.count("dinov3_reload_failed", "tokens") == 0)
        assert await is_refused(rig, "old")
        assert not await is_refused(rig, "new")


async def test_a_forced_reload_is_immediate_and_logs_an_invalid_file_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As SIGHUP forces it. A second SIGHUP logs the reason a second time."""
    path = tmp_path / "tokens"
    path.write_bytes(b"old")
    async with serving(token_file=str(path)) as rig:
        path.write_bytes(b"new")
        rig.server.reload()
        await until_async(lambda: known(rig) == [b"new"])
        path.write_bytes(b"")
        for times in (1, 2):
            rig.server.reload()
            await until_async(lambda times=times: caplog.text.count("is empty") == times)


@pytest.mark.usefixtures("quick")
async def test_a_stream_ends_at_its_next_message_after_its_token_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"old")
    async with serving(token_file=str(path)) as rig:
        call = rig.stub.ExtractStream(metadata=bearer("old"))
        await call.write(pb.ExtractStreamRequest(id=1, request=REQUEST))
        assert (await call.read()).HasField("response")
        rig.engine.hold = True
        await call.write(pb.ExtractStreamRequest(id=2, request=REQUEST))
        run = await rig.engine.runs.get()
        path.write_bytes(b"new")
        await until_async(lambda: known(rig) == [b"new"])
        await call.write(pb.ExtractStreamRequest(id=3, request=REQUEST))
        run.go.set_result(None)
        assert (await call.read()).id == 2  # messages that were read are answered
        with pytest.raises(grpc.aio.AioRpcError, match="the token is not valid"):
            await call.read()
        assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert rig.engine.runs.empty()


def put(folder: Path, pair: tuple[Path, Path]) -> dict[str, str]:
    """Server certificate, key and authorities (of clients, the same certificate) in `folder`."""
    for name, source in (("tls.crt", pair[0]), ("tls.key", pair[1]), ("ca.crt", pair[0])):
        rename_over(folder / name, source.read_bytes())
    files = {"tls_cert_file": "tls.crt", "tls_key_file": "tls.key", "tls_client_ca_file": "ca.crt"}
    return {setting: str(folder / name) for setting, name in files.items()}


@asynccontextmanager
async def connected(port: int, server: Path, pair: tuple[Path, Path]) -> AsyncIterator[Any]:
    """A client that trusts `server` and shows `pair`."""
    trusted, cert, key = (path.read_bytes() for path in (server, *pair))
    own = grpc.ssl_channel_credentials(trusted, key, cert)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"localhost:{port}", own, options) as channel:
        yield pb_grpc.FeatureServiceStub(channel)


async def test_certificate_and_authorities_are_reloaded_and_open_connections_stay(tmp_path: Path) -> None:
    async with serving(**put(tmp_path, FIRST)) as rig, connected(rig.port, FIRST[0], FIRST) as before:
        await before.Extract(REQUEST)
        put(tmp_path, RENEWED)
        rig.server.credentials.reload()
        async with connected(rig.port, RENEWED[0], RENEWED) as renewed:
            await renewed.Extract(REQUEST)
        for trusted, shown in ((FIRST[0], RENEWED), (RENEWED[0], FIRST)):  # the old certificate, the old authorities
            async with connected(rig.port, trusted, shown) as other:
                assert (await failure_of(other.Extract(REQUEST))).code == grpc.StatusCode.UNAVAILABLE
        await before.Extract(REQUEST)


async def test_tls_files_that_do_not_match_leave_the_old_ones_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(**put(tmp_path, FIRST)) as rig:
        rename_over(tmp_path / "tls.crt", RENEWED[0].read_bytes())
        rig.server.credentials.reload()
        assert rig.count("dinov3_reload_failed", "tls") == 1
        assert "KEY_VALUES_MISMATCH" in caplog.text
        async with connected(rig.port, FIRST[0], FIRST) as stub:
            await stub.Extract(REQUEST)
        rename_over(tmp_path / "tls.key", RENEWED[1].read_bytes())
        rig.server.credentials.reload()
        assert rig.count("dinov3_reload_failed", "tls") == 0
        async with connected(rig.port, RENEWED[0], FIRST) as stub:
            await stub.Extract(REQUEST)


@pytest.mark.parametrize("path", [FIRST[0], RENEWED[0], CERTIFICATES / "client.pem"], ids=lambda path: path.name)
def test_the_dates_equal_those_of_openssl(path: Path) -> None:
    """Before 2050 they are written with two digits of the year, after with four."""
    decoded = ssl._ssl._test_decode_cert(str(path))  # type: ignore[attr-defined]
    dates = lifetime(path.read_bytes())
    assert dates == tuple(map(ssl.cert_time_to_seconds, (decoded["notBefore"], decoded["notAfter"])))


def test_the_lifetime_is_of_the_first_certificate_of_a_chain() -> None:
    first, second = FIRST[0].read_bytes(), RENEWED[0].read_bytes()
    assert lifetime(b"words before it\n" + first + second) == lifetime(first) != lifetime(second)


def test_an_invalid_date_is_an_error_of_the_file(tmp_path: Path) -> None:
    """OpenSSL loads such a certificate."""
    _, start, pem = FIRST[0].read_text().partition(ssl.PEM_HEADER)
    der = ssl.PEM_cert_to_DER_cert(start + pem)
    end = ssl._ssl._test_decode_cert(str(FIRST[0]))["notAfter"]  # type: ignore[attr-defined]
    date = time.strftime("%y%m%d%H%M%SZ", time.gmtime(ssl.cert_time_to_seconds(end))).encode()
    assert der.count(date) == 1
    files = put(tmp_path, FIRST)
    (tmp_path / "tls.crt").write_text(ssl.DER_cert_to_PEM_cert(der.replace(date, b"991399" + date[6:])))
    with pytest.raises(ConfigError, match=r"tls\.crt has an invalid date"):
        credentials.Credentials(Settings(**files), Metrics())


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (-1.0, "is not valid before 1970-01-01 00:00 UTC"),
        (1.0, ""),
        (86 * DAY - 1, ""),
        (98 * DAY, "expires on 1970-04-11 00:00 UTC, in 2.0 days"),
        (101 * DAY, "expired on 1970-04-11 00:00 UTC"),
    ],
)
def test_warnings_about_the_lifetime(now: float, words: str) -> None:
    assert Lifetime(0.0, 100 * DAY).warning(now).startswith(words)
    assert bool(Lifetime(0.0, 100 * DAY).warning(now)) == bool(words)


async def test_a_certificate_that_is_about_to_expire_gives_one_warning_and_sets_the_gauge(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "lifetime", lambda _: Lifetime(0.0, 1000 * DAY))
    now = 995 * DAY
    monkeypatch.setattr(credentials.time, "time", lambda: now)
    async with serving(**put(tmp_path, FIRST)) as rig:

        def warnings() -> list[str]:
            rig.server.update_gauges()
            return [record.message for record in caplog.records if record.levelno == logging.WARNING]

        assert rig.metrics.snapshot().series["dinov3_tls_expiry_seconds"] == {(): (5 * DAY,)}
        assert len(warnings()) == 1
        now = 996 * DAY
        [warning] = warnings()
        assert "tls.crt expires on 1972-09-27 00:00 UTC, in 5.0 days" in warning
        now = 1001 * DAY
        assert "expired on" in warnings()[1]
        assert rig.metrics.snapshot().series["dinov3_tls_expiry_seconds"] == {(): (-DAY,)}
        monkeypatch.setattr(credentials, "lifetime", lambda _: Lifetime(0.0, 2000 * DAY))
        put(tmp_path, RENEWED)
        rig.server.credentials.reload()
        assert len(warnings()) == 2
        assert rig.metrics.snapshot().series["dinov3_tls_expiry_seconds"] == {(): (999 * DAY,)}


def test_checks_leave_no_descriptor_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = [path.read_bytes() for path in FIRST]
    for _ in range(3):
        tls.check_files(("c", "k", "a"), files[0], files[1], files[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
