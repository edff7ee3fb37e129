"""What the text of a setting may be, and the value it makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

_PATCH = 16  # Of every ViT variant; the stride of the ConvNeXts is a multiple of it.
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

N = TypeVar("N", int, float)


class Kind(NamedTuple):
    """What the text of a setting may be.

    `parse` makes the value, or raises ValueError; `show` writes a value as `parse` reads it; `many` tells that
    commas part several values, which YAML may write as a list.
    """

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str
    many: bool = False


def integer(least: int, most: int) -> Kind:
    def parse(text: str) -> int:
        return _within(int(text), least, most)

    return Kind("N", f"an integer from {least} to {most}", parse)


def seconds(least: float, most: float) -> Kind:
    def parse(text: str) -> float:
        return _within(float(text), least, most)

    return Kind("SECONDS", f"seconds from {least:g} to {most:g}", parse, lambda value: f"{value:g}")


def size(least: int, most: int) -> Kind:
    """Bytes, with or without a unit."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"([0-9][0-9_]*) *([A-Za-z]*)", text)
        if not found or found[2] not in _UNITS:
            raise ValueError
        return _within(int(found[1]) * _UNITS[found[2]], least, most)

    allowed = f"bytes from {_show_size(least)} to {_show_size(most)}, written as 1048576, 512MiB, 1GiB or 64MB"
    return Kind("BYTES", allowed, parse, _show_size)


def choice(*choices: str) -> Kind:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Kind("|".join(choices), "one of " + ", ".join(choices), parse)


def without_secrets(text: str) -> str:
    """A URL as it may be shown and logged: what signs it (its query) and who asks (user and password) are left out.

    Anything that is no URL stays as it is.
    """
    try:
        parts = urlsplit(text)
    except ValueError:  # what might be secret in it cannot be told
        return text.partition("://")[0] + "://..."
    if not parts.netloc:
        # A path; or a URL that lost its https:// on the way, and has what signs it still.
        path, _, query = text.partition("?")
        return f"{path}?..." if "=" in query else text
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?...' if parts.query else ''}"


def _within(value: N, least: N, most: N) -> N:
    if not least <= value <= most:  # NaN is within no range.
        raise ValueError
    return value


def _show_size(value: int) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if value and value % _UNITS[unit] == 0:
            return f"{value // _UNITS[unit]}{unit}"
    return str(value)


def _text(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[text.lower()]


def _commit(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{40}", text.lower()):
        raise ValueError
    return text.lower()


def _file(text: str) -> str:
    try:
        if not Path(text).is_file():
            raise ValueError
        Path(text).open("rb").close()
    except OSError:
        raise ValueError from None
    return text


def _devices(text: str) -> tuple[str, ...]:
    devices = tuple(part.strip() for part in text.split(","))
    gpus = [device for device in devices if device != "cpu"]
    if devices != ("auto",) and not all(re.fullmatch(r"cuda:(0|[1-9][0-9]*)", device) for device in gpus):
        raise ValueError
    if len(set(gpus)) < len(gpus):
        raise ValueError
    return devices


def _image_sizes(text: str) -> tuple[tuple[int, int], ...]:
    if text in ("", "none"):  # "" is the YAML list without items.
        return ()
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)x([0-9]+)", part.strip())
        height, width = (int(found[1]), int(found[2])) if found else (0, 0)
        if min(height, width) < _PATCH or height % _PATCH or width % _PATCH:
            raise ValueError
        sizes.append((height, width))
    return tuple(sizes)


def _projections(text: str) -> tuple[tuple[str, str], ...]:
    if text in ("", "none"):  # "" is the YAML list without items.
        return ()
    named = []
    for part in text.split(","):
        name, _, file = part.strip().partition("=")
        path = Path(file)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or path.suffix not in (".npy", ".safetensors"):
            raise ValueError
        named.append((name, _file(file)))
    if len(dict(named)) < len(named):
        raise ValueError
    return tuple(named)


TEXT = Kind("TEXT", "a text that is not empty", _text)
# Of a file or a place that may be a URL with secrets in it.
SOURCE = TEXT._replace(show=without_secrets)
BOOLEAN = Kind("true|false", "true or false", _boolean, lambda value: "true" if value else "false")
COMMIT = Kind("SHA", "the 40 hex digits of a git commit", _commit)
FILE = Kind("FILE", "a file that exists and can be read", _file)
PORT = integer(0, 65535)
DEVICES = Kind(
    "DEVICES", "auto, or a comma-separated list of cpu and cuda:N, each cuda:N once", _devices, ",".join, many=True
)
IMAGE_SIZES = Kind(
    "SIZES",
    f"none, or a comma-separated list of HEIGHTxWIDTH, both multiples of {_PATCH}",
    _image_sizes,
    lambda sizes: ",".join(f"{height}x{width}" for height, width in sizes) or "none",
    many=True,
)
PROJECTIONS = Kind(
    "NAME=FILE",
    "none, or a comma-separated list of NAME=FILE: each NAME once, of letters, digits, - and _; each FILE a .npy or "
    ".safetensors file that exists and can be read",
    _projections,
    lambda named: ",".join(f"{name}={file}" for name, file in named) or "none",
    many=True,
)
