"""Downloads resume and complete, whatever the connection does."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3_server import __version__
from dinov3_server.errors import AccessRefused, ConfigError, Unreachable
from dinov3_server.provision.download import Expected
from tests.server.provision.download_rig import DATA, SECRET, Rig, rig
from tests.support.file_server import Answer, FileServer

SHA = hashlib.sha256(DATA).hexdigest()
PATH = "/dinov3/model.pth"
ETAG = {"ETag": '"v1"'}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rig:
    return rig(monkeypatch, tmp_path)


def interrupt(here: Rig, files: FileServer, at: int, path: str = PATH) -> None:
    """Leave a part of `at` bytes, like an interrupted process."""
    files.script(path, Answer(cut_after=at))

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    original, here.sleep = here.sleep, stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        here.download(files.url(path))
    here.sleep = original  # type: ignore[method-assign]
    assert here.part.read_bytes() == DATA[:at]
    files.requests.clear()


@pytest.mark.parametrize("expected", [Expected(), Expected(len(DATA), SHA), Expected(sha256=SHA[:8].upper())])
@pytest.mark.parametrize("answer", [Answer(), Answer(chunked=True), Answer(headers={"Content-Length": None})])
def test_a_complete_download(here: Rig, files: FileServer, answer: Answer, expected: Expected) -> None:
    files.put(PATH, DATA)
    files.script(PATH, answer)
    assert here.download(files.url(PATH), expected) == SHA
    assert here.target.read_bytes() == DATA
    assert here.left() == ["model.pth"]
    assert files.requests[0].headers["user-agent"] == f"dinov3-serving/{__version__}"
    assert here.waits == []


def test_a_file_url(here: Rig, tmp_path: Path) -> None:
    source = tmp_path / "with space.pth"
    source.write_bytes(DATA)
    assert here.download(source.as_uri(), Expected(len(DATA), SHA)) == SHA
    assert here.target.read_bytes() == DATA
    assert source.read_bytes() == DATA


def test_a_file_url_resumes_while_the_file_is_unchanged(here: Rig, tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(DATA)
    here.target.parent.mkdir(parents=True)
    status = source.stat()
    about = {"url": source.as_uri(), "etag": "", "last_modified": str(status.st_mtime_ns), "size": status.st_size}
    changed = {**about, "last_modified": "1"}
    for known, length, first in ((about, 1000, b"#"), (changed, 1000, DATA[:1]), (about, len(DATA) + 1, DATA[:1])):
        # A marker in the part shows whether it was used.
        here.part.write_bytes((b"#" + DATA[1:] + b"more")[:length])
        here.about.write_text(json.dumps(known))
        here.download(source.as_uri())
        assert here.target.read_bytes() == first + DATA[1:]


def test_an_existing_file_is_replaced_by_a_complete_one_only(here: Rig, files: FileServer) -> None:
    here.target.parent.mkdir(parents=True)
    here.target.write_bytes(b"old")
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 1000)
    assert here.target.read_bytes() == b"old"
    here.download(files.url(PATH))
    assert here.target.read_bytes() == DATA


@pytest.mark.parametrize(
    "bad",
    [
        Answer(cut_after=70_000),
        Answer(chunked=True, cut_after=70_000),
        Answer(hang_up=True),
        Answer(hang_up=True, reset=True),
        Answer(status=408),
        Answer(status=429),
        Answer(status=500),
        Answer(status=503),
    ],
    ids=lambda answer: str(answer.status or ("cut" if answer.cut_after else "hang up")),
)
def test_temporary_failures_are_retried(here: Rig, files: FileServer, bad: Answer) -> None:
    files.put(PATH, DATA, ETAG)
    files.script(PATH, bad, bad)
    assert here.download(files.url(PATH)) == SHA
    assert here.target.read_bytes() == DATA
    had = bad.cut_after or 0
    assert files.ranges(PATH) == [None, *(f"bytes={had * k}-" if had else None for k in (1, 2))]
    assert here.waits == ([0.5, 0.5] if had else [1, 2])


def test_a_stall_ends_the_attempt_but_not_the_download(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    files.script(PATH, Answer(hold_after=50_000))
    assert here.download(files.url(PATH), stall_seconds=0.2) == SHA
    assert files.ranges(PATH)[:2] == [None, "bytes=50000-"]  # on a slow machine the second one may stall, too
    assert files.requests[1].headers["if-range"] == '"v1"'


def test_waits_grow_without_progress_and_restart_with_it(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    no = Answer(status=503)
    files.script(PATH, no, no, no, no, Answer(cut_after=10), no, no, no, no)
    here.download(files.url(PATH))
    assert here.waits == [1, 2, 4, 8, 0.5, 1, 2, 4, 8]


@pytest.mark.parametrize(
    ("said", "waited"), [("7", 7), ("0", 1), ("nonsense", 1), ("100000", 300), ("Fri, 01 Jan 1999 00:00:00 GMT", 1)]
)
def test_retry_after_is_followed_up_to_a_limit(here: Rig, files: FileServer, said: str, waited: float) -> None:
    files.put(PATH, DATA)
    files.script(PATH, Answer(status=429, headers={"Retry-After": said}))
    here.download(files.url(PATH))
    assert here.waits == [waited]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 3000), st.booleans(), st.booleans()), max_size=4),
    validator=st.sampled_from([{}, ETAG, {"Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"}, {"ETag": 'W/"w"'}]),
    hashed=st.booleans(),
)
def test_any_truncations_still_give_the_right_file(
    cuts: list[tuple[int, bool, bool]], validator: dict[str, str], hashed: bool
) -> None:
    data = DATA[:3000]
    digest = hashlib.sha256(data).hexdigest()
    with tempfile.TemporaryDirectory() as folder, FileServer() as files:
        here = Rig(Path(folder) / "model.pth")
        files.put(PATH, data, validator)
        files.script(PATH, *(Answer(cut_after=cut, chunked=c, ignore_range=i) for cut, c, i in cuts))
        assert here.download(files.url(PATH), Expected(sha256=digest) if hashed else Expected()) == digest
        assert here.target.read_bytes() == data
        assert here.left() == ["model.pth"]


def test_a_new_signed_url_of_the_same_file_resumes(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000, PATH)
    files.requests.clear()
    here.download(files.url(f"{PATH}?{SECRET}"))
    assert files.ranges(PATH) == ["bytes=60000-"]
    assert here.target.read_bytes() == DATA


def test_a_part_of_another_url_is_not_used(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    files.put("/other.pth", DATA[::-1], ETAG)
    interrupt(here, files, 60_000)
    here.download(files.url("/other.pth"))
    assert files.ranges("/other.pth") == [None]
    assert here.target.read_bytes() == DATA[::-1]


def test_a_part_of_another_url_stays_until_bytes_arrive(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000)
    here.fails(ConfigError, files.url("/missing.pth"))
    here.download(files.url(PATH))
    assert files.ranges(PATH) == ["bytes=60000-"]


def test_without_validators_or_a_hash_it_starts_over(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA)
    interrupt(here, files, 60_000)
    here.download(files.url(PATH))
    assert files.ranges(PATH) == [None]
    interrupt(here, files, 60_000)
    here.download(files.url(PATH), Expected(sha256=SHA))
    assert files.ranges(PATH) == ["bytes=60000-"]
    assert "if-range" not in files.requests[0].headers


@pytest.mark.parametrize(
    "changed",
    [
        Answer(headers={"ETag": '"v2"'}),  # If-Range fails: 200
        Answer(headers={"ETag": '"v2"'}, ignore_if_range=True),  # 206 of another version
        Answer(headers={"Content-Range": "bytes 59999-199999/200000"}, ignore_if_range=True),
        Answer(headers={"Content-Range": "bytes 60000-199999/200001"}),
        Answer(headers={"Content-Range": "nonsense"}),
        Answer(ignore_range=True),
        Answer(status=416),
        Answer(status=416, headers={"Content-Range": "bytes */50"}),
    ],
)
def test_a_server_without_ranges_is_asked_for_the_whole_file(here: Rig, files: FileServer, changed: Answer) -> None:
    new = DATA[::-1]
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000)
    files.put(PATH, new, {"ETag": str(changed.headers.get("ETag", '"v1"'))})
    files.script(PATH, changed)
    here.download(files.url(PATH))
    assert here.target.read_bytes() == new
    assert files.ranges(PATH) in (["bytes=60000-"], ["bytes=60000-", None])


def test_bytes_of_an_earlier_attempt_do_not_count_as_progress(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000)
    files.always(PATH, Answer(status=503))
    here.fails(Unreachable, files.url(PATH))
    assert files.ranges(PATH) == ["bytes=60000-"] * 5
    assert here.part.read_bytes() == DATA[:60_000]


def test_a_weak_etag_is_not_sent_as_if_range_but_the_date_is(here: Rig, files: FileServer) -> None:
    date = "Fri, 20 Nov 2026 10:00:00 GMT"
    files.put(PATH, DATA, {"ETag": 'W/"v1"', "Last-Modified": date})
    interrupt(here, files, 60_000)
    here.download(files.url(PATH))
    assert [(seen.headers["range"], seen.headers["if-range"]) for seen in files.requests] == [("bytes=60000-", date)]
    assert here.target.read_bytes() == DATA


def test_bytes_beyond_the_range_are_ignored(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000)
    files.script(PATH, Answer(body=DATA + b"more", headers={"Content-Range": "bytes 60000-199999/200000"}))
    here.download(files.url(PATH))
    assert here.target.read_bytes() == DATA


@pytest.mark.parametrize("said", ["bytes */200000", None])
def test_a_complete_part_is_checked_and_used(here: Rig, files: FileServer, said: str | None) -> None:
    files.put(PATH, DATA, ETAG)
    interrupt(here, files, 60_000)
    here.part.write_bytes(DATA)
    files.script(PATH, Answer(status=416, headers={"Content-Range": said}))
    assert here.download(files.url(PATH), Expected(sha256=SHA)) == SHA
    assert files.ranges(PATH) == ["bytes=200000-"]
    assert here.target.read_bytes() == DATA
    assert here.left() == ["model.pth"]


@pytest.mark.parametrize("about", ["", "{}", "[]", '{"url": 1}', '{"url": "URL", "etag": "", "last_modified": ""}'])
def test_a_part_without_metadata_is_fetched_again(here: Rig, files: FileServer, about: str) -> None:
    files.put(PATH, DATA)
    here.target.parent.mkdir(parents=True)
    here.part.write_bytes(b"?" * 500_000)
    here.about.write_text(about.replace("URL", files.url(PATH)))
    here.download(files.url(PATH), Expected(sha256=SHA))
    assert files.ranges(PATH) == [None]
    assert here.target.read_bytes() == DATA


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_keep_the_range_but_send_no_secrets_to_another_host(
    here: Rig, files: FileServer, status: int
) -> None:
    secret = {"Authorization": "Bearer hf_token", "Cookie": "session=1"}
    with FileServer() as cdn:
        cdn.put("/cdn", DATA, ETAG)
        cdn.script("/cdn", Answer(cut_after=100_000))
        files.always(PATH, Answer(status=status, headers={"Location": "/second"}))
        files.always("/second", Answer(status=status, headers={"Location": cdn.url(f"/cdn?{SECRET}")}))
        assert here.download(files.url(PATH), headers=secret) == SHA
    assert [seen.headers.get("authorization") for seen in files.requests] == ["Bearer hf_token"] * 4
    assert cdn.ranges("/cdn") == [None, "bytes=100000-"]
    for seen in cdn.requests:
        assert not {"authorization", "cookie"} & set(seen.headers)
        assert seen.query == SECRET
    assert here.target.read_bytes() == DATA


def test_an_error_message_with_the_query_in_it_is_not_quoted(here: Rig, files: FileServer) -> None:
    with FileServer() as cdn:
        cdn.always("/cdn", Answer(status=403, body=b"c2lnbmVk~a-b_c has expired"))
        files.always(PATH, Answer(status=302, headers={"Location": cdn.url(f"/cdn?{SECRET}")}))
        assert "c2lnbmVk" not in here.fails(AccessRefused, files.url(PATH))


def test_user_and_password_in_the_url(here: Rig, files: FileServer) -> None:
    files.put(PATH, DATA)
    here.download(files.url(PATH).replace("://", "://ann:s%40crt@"))
    assert files.requests[0].headers["authorization"] == "Basic YW5uOnNAY3J0"
    assert files.requests[0].headers["host"] == f"127.0.0.1:{files.port}"


def test_the_proxy_in_the_environment_is_used(here: Rig, files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", files.url("/"))
    monkeypatch.setenv("no_proxy", "")
    files.put("/file", DATA)
    assert here.download("http://mirror.invalid/file") == SHA
    assert files.requests[0].headers["host"] == "mirror.invalid"


def test_no_secret_is_written_anywhere(here: Rig, files: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    files.put(PATH, DATA, ETAG)
    url = files.url(f"{PATH}?{SECRET}").replace("://", "://annabel:passw0rd@")
    files.script(
        PATH,
        Answer(cut_after=1000),
        Answer(hang_up=True),
        Answer(status=503, body=f"busy with {PATH}?{SECRET}".encode()),
        Answer(status=403, body=b"Signature c2lnbmVk~a-b_c for passw0rd has expired"),
    )
    with pytest.raises(Exception) as raised:
        here.download(url)
    kept = here.about.read_text()
    assert json.loads(kept)["url"] == files.url(PATH)
    text = "\n".join([str(raised.value), repr(raised.value), caplog.text, *here.reports, kept])
    for secret in ("eyJTdGF0ZW1lbnQiOl", "c2lnbmVk", "K15QRJLYKIFSLZ", "passw0rd", "annabel"):
        assert secret not in text
    assert len(here.reports) == 4
