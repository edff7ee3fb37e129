"""Reads files at URLs, by fsspec (https://filesystem-spec.readthedocs.io): object stores, web servers and others.

Credentials come from where each store's package looks for them (environment, its own files, fsspec's configuration), or
from the URL. URLs that are shown, or kept as ids and sources, have neither user, password, query nor fragment.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

from dinov3_client.bulk.errors import SourceError, StoreError, TooLarge

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URLS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"]*)")
WEB = ("http", "https")
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
    "https": "aiohttp", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "sftp": "paramiko", "ssh": "paramiko",
}  # fmt: skip

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further attempt."""
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0
"""Waits for a web server: for a connection, and for the next bytes."""
BLOCK_BYTES = 4 << 20
"""Bytes of one request while a tar file is listed."""

_T = TypeVar("_T")


def is_url(text: str) -> bool:
    """Return whether `text` begins as a URL."""
    return _URL.match(text) is not None


def is_web(url: str) -> bool:
    """Return whether a text begins as the URL of a web server."""
    return is_url(url) and url.partition("://")[0].lower() in WEB


def without_secrets(text: str) -> str:
    """Return a text without the users, passwords, queries and fragments of the URLs in it.

    In names of other stores than web servers, # and ? are characters like others; there only ?NAME=VALUE is a query.
    """
    return _URLS.sub(_without_secrets, text)


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found.groups()
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2] if ":" in authority and not authority.endswith("]") else ""
    if "@" in authority:
        rest = authority.rpartition("@")[2] + rest[len(authority) :]
    elif port and not port.isdecimal():  # a password with / ? or # in it
        rest = rest.rpartition("@")[2] if "@" in rest else ""
    query = "[?#]" if scheme.lower() in WEB else r"\?[^?/]*="
    return f"{scheme}://{re.split(query, rest, maxsplit=1)[0]}"


def parent(url: str) -> str:
    """Return the URL of the folder of a file."""
    return url.partition("?")[0].rpartition("/")[0]


class Entry(NamedTuple):
    """A file in a store."""

    path: str
    """As the store names it."""
    size: int | None
    """In bytes, if known."""


class Store:
    """A file system of fsspec, with retries. Its paths may hold credentials."""

    def __init__(self, url: str) -> None:
        """Find the file system of a URL. Raises SourceError if it is unknown or its package is not installed."""
        self.scheme = url.partition("://")[0].lower()
        self.web = self.scheme in WEB
        self._fs, path = _file_system(url, self.scheme, self.web)
        whole = url.rstrip("/")
        self._prefix = whole.removesuffix(path) if whole.endswith(path) else None

    def path(self, url: str) -> str:
        """Return the path of a URL in this store."""
        path: str = self._fs._strip_protocol(url)
        return path

    def url(self, path: str) -> str:
        """Return the URL of a path, without credentials."""
        url = path if self.web else self._fs.unstrip_protocol(path) if self._prefix is None else self._prefix + path
        return without_secrets(url)

    def kind(self, path: str) -> str | None:
        """Return "file", "directory" or None for nothing. Of a web server, a URL that ends in / is a directory."""
        if self.web:
            return "directory" if urlsplit(path).path.endswith("/") else "file"
        try:
            return "directory" if self._call(path, lambda: self._fs.info(path))["type"] == "directory" else "file"
        except StoreError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def is_pattern(self, path: str) -> bool:
        """Return whether a path is a glob. In the URL of a web server only * marks one."""
        return "*" in urlsplit(path).path if self.web else glob.has_magic(path)

    def matches(self, pattern: str) -> list[Entry]:
        """Return the files that match a glob, in order."""
        return self._entries(self._call(pattern, lambda: self._fs.glob(pattern, detail=True)))

    def below(self, folder: str) -> list[Entry]:
        """Return all files below a folder, in order."""
        return self._entries(self._call(folder, lambda: self._fs.find(folder, detail=True)))

    def read(self, entry: Entry, most: int | None) -> bytes:
        """Return a file's contents. Raises TooLarge if there are more than `most` bytes, and OSError."""
        if self.web:
            return self._call(entry.path, lambda: self._stream(entry.path, most))
        size = entry.size
        if most is not None and size is None:
            size = self.size(entry.path)
        if most is not None and size is not None and size > most:
            raise TooLarge(size)
        return self._call(entry.path, lambda: bytes(self._fs.cat_file(entry.path)))

    def part(self, path: str, begin: int, end: int) -> bytes:
        """Return the bytes `begin` to `end` of a file. Raises OSError."""
        if begin >= end:
            return b""
        data = self._call(path, lambda: bytes(self._fs.cat_file(path, start=begin, end=end)))
        if len(data) > end - begin:
            raise StoreError(errno.EOPNOTSUPP, "the server sends no parts of files, which tars need", self.url(path))
        return data

    def size(self, path: str) -> int:
        """Return the size of a file in bytes. Raises OSError."""
        size = self._call(path, lambda: self._fs.info(path)).get("size")
        if size is None:
            raise StoreError(errno.EOPNOTSUPP, "the server reports no size, which tars need", self.url(path))
        return int(size)

    def open(self, path: str) -> BinaryIO:
        """Open a file for reading at any place."""
        return io.BufferedReader(_File(self, path, self.size(path)), BLOCK_BYTES)

    def _stream(self, path: str, most: int | None) -> bytes:
        # size=1 spares fsspec a question for the size, which servers and signed URLs may refuse.
        with self._fs.open(path, block_size=0, size=1) as file:
            data = bytearray()
            while part := file.read(1 << 20):
                data += part
                if most is not None and len(data) > most:
                    raise TooLarge(int(file.r.headers.get("Content-Length") or len(data)))
        return bytes(data)

    def _entries(self, found: dict[str, dict[str, Any]]) -> list[Entry]:
        files = (Entry(path, info.get("size")) for path, info in found.items() if info.get("type") != "directory")
        # Folders of web servers have links that sort their listing, "?C=N;O=D".
        return sorted(each for each in files if not each.path.endswith("/") and not (self.web and "?" in each.path))

    def _call(self, path: str, action: Callable[[], _T]) -> _T:
        """Return the result of `action`, tried again after errors that may pass. Raises StoreError and TooLarge.

        An error of ENOENT, EACCES, EISDIR or ENXIO is of this file alone.
        """
        host = urlsplit(path).netloc if self.web else self.scheme
        begun = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                result = action()
            except TooLarge:
                raise
            except Exception as error:  # each package has errors of its own
                fault = _fault(error, self.web)
                if fault is not None:
                    raise StoreError(*fault, self.url(path)) from None
                if pause is None:
                    # A host that fails while others answer is at fault, not the network.
                    number = errno.ENXIO if _answers.of_others(host, begun) else errno.EIO
                    text = f"no answer after {len(PAUSES) + 1} attempts: {_words(error)}"
                    raise StoreError(number, text, self.url(path)) from None
            else:
                _answers.note(host)
                return result
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


class _Answers:
    """When each host answered last."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, host: str) -> None:
        with self._lock:
            self._last[host] = time.monotonic()

    def of_others(self, host: str, since: float) -> bool:
        with self._lock:
            return any(at >= since for other, at in self._last.items() if other != host)


_answers = _Answers()


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a store, to read."""

    store: Store
    entry: Entry

    def read(self, span: tuple[int, int] | None, most: int | None) -> bytes:
        """Return its contents, or those of a span (first byte, length). Raises OSError and TooLarge."""
        if span is None:
            return self.store.read(self.entry, most)
        begin, size = span
        if most is not None and size > most:
            raise TooLarge(size)
        return self.store.part(self.entry.path, begin, begin + size)

    def open(self) -> BinaryIO:
        """Open it for reading at any place."""
        return self.store.open(self.entry.path)


class _File(io.RawIOBase):
    """A file in a store, read in parts."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self._store, self._path, self._size, self._at = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if not 0 <= place < 2**63:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = place
        return place

    def readinto(self, buffer: Any) -> int:
        data = self._store.part(self._path, self._at, min(self._at + len(buffer), self._size))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _file_system(url: str, scheme: str, web: bool) -> tuple[Any, str]:
    shown = without_secrets(url)
    try:
        import fsspec
    except ImportError:
        raise SourceError(f"{shown}: URLs need fsspec: pip install 'dinov3-serving[fsspec]'") from None
    if "::" in url.partition("?")[0]:
        raise SourceError(f"{shown}: chained URLs (::) are not supported; give the URL of a folder, an image or a .tar")
    try:
        options = {"use_listings_cache": False} | (_web_options() if web else {})
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"URLs of {scheme}:// need {package}: pip install {package}" if package else str(error)
        raise SourceError(f"{shown}: {advice}") from None
    except Exception as error:  # each package checks its own options
        raise SourceError(f"{shown} cannot be used: {_words(error)}") from None
    return fs, path


def _web_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    return {"client_kwargs": {"timeout": timeout}}


def _fault(error: Exception, web: bool) -> tuple[int, str] | None:
    """Return errno and words of an error to raise at once, or None if the same request may succeed later."""
    status = _status(error)
    if isinstance(error, FileNotFoundError):
        return (errno.ENOENT, os.strerror(errno.ENOENT))
    if isinstance(error, IsADirectoryError):
        return (errno.EISDIR, os.strerror(errno.EISDIR))
    if isinstance(error, PermissionError) and not web:
        response = getattr(error.__cause__, "response", None)
        code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
        if code in ("", "403", "AccessDenied", "Forbidden"):
            return (errno.EACCES, f"Permission denied: {_words(error)}")
        return (errno.EIO, f"the store refuses the credentials: {code}: {_words(error)}")  # of all files
    if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
        denied = status in (401, 403, 407)
        return (errno.EACCES if denied else errno.ENOENT, f"the server answered with status {status}")
    if isinstance(error, ValueError):  # such as a URL that is none
        return (errno.ENXIO, _words(error))
    return None


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error of aiohttp, gcsfs or huggingface_hub."""
    status = getattr(error, "status", None)
    if status is None:
        status = getattr(error, "code", None)
    if status is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _words(error: Exception) -> str:
    return without_secrets(str(error)) or type(error).__name__
