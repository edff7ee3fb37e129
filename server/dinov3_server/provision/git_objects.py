"""What a commit holds, read from a repository's files and proven by its id, without git.

The id of a commit is the SHA-1 of its content, which names its tree, which names its files: whatever is read here is
hashed again, so nothing but the commit asked for passes. No program is started for it, so no configuration, no
environment and no owner of a folder has a say, nothing is written, and a machine that only serves needs no git.

Formats: gitformat-pack(5) (packs and their indices, version 2), gitrepository-layout(5).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

_KINDS = {1: b"commit", 2: b"tree", 3: b"blob", 4: b"tag"}
_OFFSET_DELTA, _NAMED_DELTA = 6, 7
_FOLDER = 0o040000  # the mode of a tree in a tree
_PIECE = 1 << 16  # bytes of a pack that are looked at together


class Damaged(Exception):
    """The repository lacks an object, or holds one that is not what its name says."""


class Entry(NamedTuple):
    """A file of a commit: its mode as git has it, and the id of its content."""

    mode: int
    blob: str


class Head(NamedTuple):
    """What is checked out: a commit, and the branch it stands on, None where it is detached."""

    commit: str
    branch: str | None


def object_id(kind: bytes, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0%s" % (kind, len(content), content), usedforsecurity=False).hexdigest()


def head(git_dir: Path) -> Head:
    """Raises Damaged where no commit is checked out, OSError where the file cannot be read."""
    text = (git_dir / "HEAD").read_text(errors="replace").strip()
    if not text.startswith("ref: "):
        commit, branch = text, None
    else:
        reference = text.removeprefix("ref: ")
        branch = reference.removeprefix("refs/heads/")
        try:
            commit = (git_dir / reference).read_text(errors="replace").strip()
        except OSError:
            commit = _packed_reference(git_dir, reference)
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise Damaged("its HEAD names no commit")
    return Head(commit, branch)


def files(git_dir: Path, commit: str) -> dict[str, Entry]:
    """Every file of a commit by its path from the root. Raises Damaged, or OSError where a file cannot be read."""
    try:
        with ExitStack() as opened:
            return dict(_Objects(git_dir / "objects", opened).files(commit))
    except (zlib.error, struct.error, LookupError, ValueError, RecursionError) as error:
        raise Damaged(f"its objects cannot be read ({error})") from None


def _packed_reference(git_dir: Path, reference: str) -> str:
    packed = git_dir / "packed-refs"
    for line in packed.read_text(errors="replace").splitlines() if packed.exists() else ():
        commit, _, name = line.partition(" ")
        if name == reference:
            return commit
    return ""


class _Pack(NamedTuple):
    listing: mmap.mmap
    data: mmap.mmap

    def offset(self, name: bytes) -> int | None:
        """Where in the pack an object begins.

        The index is: a fan-out table by the first byte, sorted names, checksums, offsets, offsets that need 64 bits.
        """
        if self.listing[:8] != b"\xfftOc\0\0\0\2":
            raise ValueError("a pack's index is not of version 2")
        fan_out = struct.unpack_from(">256I", self.listing, 8)
        first, last, count = fan_out[name[0] - 1] if name[0] else 0, fan_out[name[0]], fan_out[255]
        names = 8 + 1024
        for place in range(first, last):
            if self.listing[names + 20 * place : names + 20 * place + 20] == name:
                (offset,) = struct.unpack_from(">I", self.listing, names + 24 * count + 4 * place)
                if offset & 0x8000_0000:
                    place = offset & 0x7FFF_FFFF
                    (offset,) = struct.unpack_from(">Q", self.listing, names + 28 * count + 8 * place)
                return int(offset)
        return None

    def inflate(self, at: int) -> bytes:
        stream, parts = zlib.decompressobj(), []
        while not stream.eof:
            if at >= len(self.data):
                raise ValueError("a pack is cut short")
            parts.append(stream.decompress(self.data[at : at + _PIECE]))
            at += _PIECE
        return b"".join(parts)


class _Objects:
    """The objects of a repository; the packs that are opened are closed with `opened`."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._folder = folder
        self._packs = [
            _Pack(_mapped(path, opened), _mapped(path.with_suffix(".pack"), opened))
            for path in sorted(folder.glob("pack/*.idx"))
        ]

    def files(self, commit: str) -> Iterator[tuple[str, Entry]]:
        found = re.match(rb"tree ([0-9a-f]{40})\n", self._read(commit, b"commit"))
        if not found:
            raise Damaged(f"its commit {commit} names no tree")
        yield from self._walk(found[1].decode(), "")

    def _walk(self, tree: str, folder: str) -> Iterator[tuple[str, Entry]]:
        content = self._read(tree, b"tree")
        at = 0
        while at < len(content):  # entries of: mode in octal, a space, name, a zero byte, id in 20 bytes
            zero = content.index(b"\0", at)
            mode, _, name = content[at:zero].partition(b" ")
            entry = Entry(int(mode, 8), content[zero + 1 : zero + 21].hex())
            path = folder + os.fsdecode(name)
            at = zero + 21
            if entry.mode == _FOLDER:
                yield from self._walk(entry.blob, path + "/")
            else:
                yield path, entry

    def _read(self, name: str, kind: bytes) -> bytes:
        """The content of an object. Raises Damaged where there is none that is true to its name."""
        found = self._find(bytes.fromhex(name))
        if found is None:
            raise Damaged(f"its {kind.decode()} {name} is missing")
        if found[0] != kind or object_id(*found) != name:
            raise Damaged(f"its {kind.decode()} {name} is damaged")
        return found[1]

    def _find(self, name: bytes) -> tuple[bytes, bytes] | None:
        loose = self._folder / name.hex()[:2] / name.hex()[2:]
        if loose.exists():
            header, _, content = zlib.decompress(loose.read_bytes()).partition(b"\0")
            return header.partition(b" ")[0], content
        for pack in self._packs:
            offset = pack.offset(name)
            if offset is not None:
                return self._packed(pack, offset)
        return None

    def _packed(self, pack: _Pack, offset: int) -> tuple[bytes, bytes]:
        """The object that begins at `offset`: stored whole, or as a difference from another."""
        byte, at = pack.data[offset], offset + 1
        number = byte >> 4 & 7
        while byte & 0x80:  # its length, which the compressed data tells too
            byte, at = pack.data[at], at + 1
        if number in _KINDS:
            return _KINDS[number], pack.inflate(at)
        if number == _OFFSET_DELTA:
            byte, at = pack.data[at], at + 1
            back = byte & 0x7F
            while byte & 0x80:
                byte, at = pack.data[at], at + 1
                back = (back + 1 << 7) | (byte & 0x7F)
            base: tuple[bytes, bytes] | None = self._packed(pack, offset - back)
        elif number == _NAMED_DELTA:
            base = self._find(pack.data[at : at + 20])
            at += 20
        else:
            raise ValueError(f"a pack holds an object of the unknown kind {number}")
        if base is None:
            raise Damaged("its packs lack what another object is stored as a difference from")
        return base[0], _patched(base[1], pack.inflate(at))


def _mapped(path: Path, opened: ExitStack) -> mmap.mmap:
    with path.open("rb") as file:
        return opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _patched(base: bytes, delta: bytes) -> bytes:
    at = 0
    for _length in ("of the base", "of the result"):  # both are implied by the rest
        while delta[at] & 0x80:
            at += 1
        at += 1
    result = bytearray()
    while at < len(delta):
        order, at = delta[at], at + 1
        if not order & 0x80:  # so many bytes that follow
            result += delta[at : at + order]
            at += order
            continue
        start = size = 0  # a stretch of the base; only the bytes of both numbers that are not zero are there
        for bit in range(7):
            if order >> bit & 1:
                if bit < 4:
                    start |= delta[at] << 8 * bit
                else:
                    size |= delta[at] << 8 * (bit - 4)
                at += 1
        result += base[start : start + (size or 0x10000)]
    return bytes(result)
