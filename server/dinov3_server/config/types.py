"""The types of settings: which texts are allowed, and how they are parsed and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

_PATCH = 16  # the patch size of every ViT variant; the stride of the ConvNeXts is a multiple of it
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

N = TypeVar("N", int, float)


class SettingType(NamedTuple):
    """The type of a setting's value.

    `parse` turns a text into the value, or raises ValueError; `show` turns a value into a text that `parse` reads. If
    `is_list`, the text is comma-separated, and YAML may have a list instead.
    """

    metavar: str
    allowed: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str
    is_list: bool = False


def integer(least: int, most: int) -> SettingType:
    return SettingType("N", f"an integer from {least} to {most}", lambda text: _within(int(text), least, most))


def seconds(least: float, most: float) -> SettingType:
    return SettingType(
        "SECONDS",
        f"seconds from {least:g} to {most:g}",
        lambda text: _within(float(text), least, most),
        lambda value: f"{value:g}",
    )


def size(least: int, most: int) -> SettingType:
    """Return the type of a number of bytes, with or without a unit."""

    def parse(text: str) -> int:
        found = re.fullmatch(r"([0-9][0-9_]*) *([A-Za-z]*)", text)
        if not found or found[2] not in _UNITS:
            raise ValueError
        return _within(int(found[1]) * _UNITS[found[2]], least, most)

    allowed = f"bytes from {_show_size(least)} to {_show_size(most)}, written as 1048576, 512MiB, 1GiB or 64MB"
    return SettingType("BYTES", allowed, parse, _show_size)


def choice(*choices: str) -> SettingType:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return SettingType("|".join(choices), "one of " + ", ".join(choices), parse)


def without_secrets(text: str) -> str:
    """Return a URL without its query (which may hold a signature), user and password, to be shown and logged.

    Any text that is not a URL is returned unchanged.
    """
    try:
        parts = urlsplit(text)
    except ValueError:  # the secret parts cannot be found
        return text.partition("://")[0] + "://..."
    if not parts.netloc:
        # A path; or a URL without its https://, which may still hold a signature.
        path, _, query = text.partition("?")
        return f"{path}?..." if "=" in query else text
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?...' if parts.query else ''}"


def _within(value: N, least: N, most: N) -> N:
    if not least <= value <= most:  # NaN is within no range
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
    if text in ("", "none"):  # "" is an empty YAML list
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
    if text in ("", "none"):  # "" is an empty YAML list
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


TEXT = SettingType("TEXT", "a text that is not empty", _text)
# A file or a location, which may be a URL with secrets in it.
SOURCE = TEXT._replace(show=without_secrets)
BOOLEAN = SettingType("true|false", "true or false", _boolean, lambda value: "true" if value else "false")
COMMIT = SettingType("SHA", "the 40 hex digits of a git commit", _commit)
FILE = SettingType("FILE", "a file that exists and can be read", _file)
PORT = integer(0, 65535)
DEVICES = SettingType(
    "DEVICES", "auto, or a comma-separated list of cpu and cuda:N, each cuda:N once", _devices, ",".join, is_list=True
)
IMAGE_SIZES = SettingType(
    "SIZES",
    f"none, or a comma-separated list of HEIGHTxWIDTH, both multiples of {_PATCH}",
    _image_sizes,
    lambda sizes: ",".join(f"{height}x{width}" for height, width in sizes) or "none",
    is_list=True,
)
PROJECTIONS = SettingType(
    "NAME=FILE",
    "none, or a comma-separated list of NAME=FILE: each NAME once, of letters, digits, - and _; each FILE a .npy or "
    ".safetensors file that exists and can be read",
    _projections,
    lambda named: ",".join(f"{name}={file}" for name, file in named) or "none",
    is_list=True,
)
