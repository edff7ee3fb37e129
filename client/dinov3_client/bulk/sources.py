"""The images of an extraction: which, in which order, and under which ids.

Order and ids depend on what was given and on names alone, so that a later run finds the same. An image costs about as
much memory as its id; nothing is opened but tar files, of which the headers are read.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import stat
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import overload

from dinov3_client.bulk.errors import SourceError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
"""Of image files in folders, and of image members in tar shards, where the first of them that a sample has counts."""

_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS)
_TAR = ".tar"
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_BLOCK = 512


class TooLarge(Exception):
    """A file that no request can hold."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


@dataclass(frozen=True, slots=True)
class Item:
    """One image."""

    id: str
    """Unique in its extraction."""
    path: str
    """The file that it is, or lies in."""
    span: tuple[int, int] | None
    """Where it lies in a tar file: first byte and length."""
    stem: str
    """What a file of its own would be called, relative and without an ending; not unique by itself."""

    @property
    def source(self) -> str:
        """Where to find it, for people."""
        return self.path if self.span is None else self.id

    def read(self, most: int | None = None) -> bytes:
        """Its bytes. Raises OSError, and TooLarge where there are more than `most`, which are not read then."""
        with open(self.path, "rb", opener=_at_once) as file:
            told = os.fstat(file.fileno())
            if not stat.S_ISREG(told.st_mode):
                raise OSError(errno.ENXIO, "not a regular file", self.path)
            begin, size = self.span or (0, told.st_size)
            if most is not None and size > most:
                raise TooLarge(size)
            file.seek(begin)
            data = file.read(size)
        if self.span is not None and len(data) < size:
            raise OSError(f"{self.path} ends within it")
        return data


class _Files:
    """Files below a folder, with ids relative to it; or, with no folder, under the names given."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self._folder = folder
        self.ids = names

    def item(self, index: int) -> Item:
        name = self.ids[index]
        inner = name if self._folder else os.path.basename(name)  # noqa: PTH119 - see Item.read
        return Item(name, os.path.join(self._folder, name), None, _without_ending(inner))  # noqa: PTH118


class _Tar:
    """The samples of a webdataset shard that have an image."""

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._stem = os.path.basename(name).removesuffix(_TAR)  # noqa: PTH119
        self._spans = array("Q")
        self.ids: list[str] = []
        for key, begin, size in _samples(path):
            self.ids.append(f"{name}:{key}")
            self._spans.extend((begin, size))
        self._prefix = len(name) + 1

    def item(self, index: int) -> Item:
        sample = self.ids[index]
        begin, size = self._spans[2 * index : 2 * index + 2]
        return Item(sample, self._path, (begin, size), f"{self._stem}/{sample[self._prefix :]}")


class Images(Sequence[Item]):
    """All images, in their order. Raises SourceError where two have one id."""

    def __init__(self, groups: Sequence[_Files | _Tar]) -> None:
        self._groups = groups
        self._ends = list(accumulate(len(group.ids) for group in groups))
        known: set[str] = set()
        for index, name in enumerate(self.ids()):
            if name in known:
                first = next(other for other, earlier in enumerate(self.ids()) if earlier == name)
                raise SourceError(
                    f"two images have the id {name}: {self._told(first)} and {self._told(index)}; give each image "
                    "once, and those of equal names to runs with an --out of their own"
                )
            known.add(name)

    def ids(self) -> Iterator[str]:
        return chain.from_iterable(group.ids for group in self._groups)

    def digest(self) -> str:
        """SHA-256 of all ids in their order."""
        digest = hashlib.sha256()
        for name in self.ids():
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        group = bisect_right(self._ends, places)
        return self._groups[group].item(places - (self._ends[group - 1] if group else 0))

    def _told(self, index: int) -> str:
        item = self[index]
        return f"{item.path} (image {index})" if item.span is None else f"{item.path} (byte {item.span[0]})"


def find(given: Iterable[str], lists: Iterable[Path] = ()) -> Images:
    """The images of folders, files, globs, tar shards and brace ranges of them, then of the files that `lists` name.

    Raises SourceError for what is not there or holds no image, and OSError.
    """
    groups: list[_Files | _Tar] = []
    for source in given:
        for path in _expanded(source):
            groups.extend(_of_folder(path) if os.path.isdir(path) else _of_files([path]))  # noqa: PTH112
    for file in lists:
        # Not splitlines: names may hold what that takes for a line's end (U+2028, say).
        lines = [line.removesuffix("\r") for line in os.fsdecode(file.read_bytes()).split("\n")]
        if any("\0" in line for line in lines):
            raise SourceError(f"{file} is no list of images: it holds bytes of 0, which no name has")
        groups.extend(_of_files([line for line in lines if line.strip()]))
    images = Images(groups)
    if not images:
        raise SourceError(f"the list holds no image: {', '.join(map(str, lists))}")
    return images


def _expanded(source: str) -> list[str]:
    """The paths that a source stands for: itself, where it is there."""
    if os.path.lexists(source):
        return [source]
    paths = []
    for pattern in _ranges(source):
        if os.path.lexists(pattern):
            paths.append(pattern)
        elif glob.has_magic(pattern):
            paths += sorted(path for path in glob.iglob(pattern, recursive=True) if not os.path.isdir(path))  # noqa: PTH112, PTH207
        else:
            raise SourceError(f"there is no file or folder {pattern}")
    if not paths:
        raise SourceError(f"no file matches {source}")
    return paths


def _ranges(pattern: str) -> Iterator[str]:
    """`a-{08..10}.tar` as a-08.tar, a-09.tar, a-10.tar: as bash has it, zeros in front and all."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if int(first) <= int(last) else -1
    for number in range(int(first), int(last) + step, step):
        yield from _ranges(f"{pattern[: found.start()]}{number:0{width}}{pattern[found.end() :]}")


def _of_files(paths: list[str]) -> Iterator[_Files | _Tar]:
    """Each file under the name given, runs of plain ones together."""
    run: list[str] = []
    for path in paths:
        lower = path.lower()
        if lower.endswith(_PACKED_TARS):
            raise SourceError(
                f"{path} is a compressed tar file, in which no sample can be found again; unpack it first"
            )
        if lower.endswith(_TAR):
            if run:
                yield _Files("", run)
                run = []
            yield _shard(path, path)
        else:
            run.append(path)
    if run:
        yield _Files("", run)


def _of_folder(folder: str) -> Iterator[_Files | _Tar]:
    names = sorted(_below(folder))
    if not names:
        raise SourceError(f"{folder} holds no image ({', '.join(EXTENSIONS)}) and no uncompressed tar shard")
    run: list[str] = []
    for name in names:
        if name.lower().endswith(_TAR):
            if run:
                yield _Files(folder, run)
                run = []
            yield _shard(os.path.join(folder, name), name)  # noqa: PTH118
        else:
            run.append(name)
    if run:
        yield _Files(folder, run)


def _below(folder: str) -> Iterator[str]:
    """Names of images and shards, hidden ones left out. Links to folders are followed, but never in a circle."""
    waiting = [(folder, "", frozenset[tuple[int, int]]())]
    while waiting:
        path, prefix, above = waiting.pop()
        told = os.stat(path)  # noqa: PTH116
        here = (told.st_dev, told.st_ino)
        if here in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
                    waiting.append((entry.path, f"{prefix}{entry.name}/", above | {here}))
                elif entry.name.lower().endswith((*_ENDINGS, _TAR)):
                    yield prefix + entry.name


def _at_once(path: str, flags: int) -> int:
    """Opens a pipe too without waiting for one who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _shard(path: str, name: str) -> _Tar:
    shard = _Tar(path, name)
    if not shard.ids:
        raise SourceError(f"{path} holds no sample with an image ({', '.join(EXTENSIONS)})")
    return shard


def _samples(path: str) -> Iterator[tuple[str, int, int]]:
    """Key, first byte and length of the image of each sample that has one.

    A sample is what webdataset takes for one: neighbours whose names agree up to the first dot of the last part
    (https://github.com/webdataset/webdataset, "The WebDataset Format").
    """
    current, best = "", len(EXTENSIONS)
    span = (0, 0)
    for name, begin, size in _members(path):
        folder, _, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != current:
            if best < len(EXTENSIONS):
                yield current, *span
            current, best = key, len(EXTENSIONS)
        rank = EXTENSIONS.index(extension.lower()) if extension.lower() in EXTENSIONS else len(EXTENSIONS)
        if rank < best:
            best, span = rank, (begin, size)
    if best < len(EXTENSIONS):
        yield current, *span


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and length of each regular member. Raises SourceError for a damaged file, and OSError."""
    with open(path, "rb") as file:  # noqa: PTH123
        nbytes = os.fstat(file.fileno()).st_size
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                    if tar.offset <= end or member.size < 0:
                        raise SourceError(f"{path} is a damaged tar file: {member.name} has {member.size} bytes")
                    end = tar.offset
                    if not member.isreg() or os.path.basename(member.name).startswith("."):  # noqa: PTH119
                        continue
                    if member.sparse is not None:
                        if member.name.lower().endswith(_ENDINGS):
                            raise SourceError(f"{path} has {member.name} as a sparse file; make it without --sparse")
                        continue
                    if member.offset_data + member.size > nbytes:
                        raise SourceError(
                            f"{path} is a damaged tar file: {member.name} of {member.size} bytes, from byte "
                            f"{member.offset_data} on, goes beyond its end at {nbytes}"
                        )
                    yield member.name.removeprefix("./"), member.offset_data, member.size
                end = tar.offset
        except SourceError:
            raise
        except OSError as error:
            if error.errno != errno.EINVAL:  # of a seek to an absurd place
                raise OSError(error.errno, error.strerror, path) from None
            raise SourceError(f"{path} is a damaged tar file: {error.strerror}") from None
        except Exception as error:  # absurd headers make tarfile raise all sorts
            raise SourceError(f"{path} is no tar file, or a damaged one: {error}") from None
        # tarfile takes a header that it cannot read for the end.
        file.seek(max(end, 0))
        rest = file.read(_TAR_BLOCK)
    if rest.strip(b"\0"):
        raise SourceError(f"{path} is a damaged tar file: what stands at byte {end} is neither a member nor its end")


def _without_ending(name: str) -> str:
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    return stem if ending.lower() in _ENDINGS else name
