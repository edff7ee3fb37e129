"""Lists the images of an extraction, in order and with ids.

Order and ids depend on the arguments and on names alone, so that a later run finds the same. An image takes about as
much memory as its id; no files are opened but tar files, whose headers are read.
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
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import overload

from dinov3_client.bulk.errors import SourceError

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "heic", "heif")
"""Extensions of images in folders and tar shards; of a sample in a tar shard the first of these counts."""

_ENDINGS = tuple(f".{extension}" for extension in EXTENSIONS)
_TAR = ".tar"
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TAR_BLOCK = 512


class TooLarge(Exception):
    """A file is too large for a request."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to one image, not yet read."""

    id: str
    """Unique in its extraction."""
    path: str
    """The file, or the tar file that contains it."""
    span: tuple[int, int] | None
    """First byte and length within a tar file; None of a plain file."""
    stem: str
    """Relative path, without extension, of a file named after it; not necessarily unique."""

    @property
    def source(self) -> str:
        """The location to show in messages."""
        return self.path if self.span is None else self.id

    def read(self, most: int | None = None) -> bytes:
        """Read its bytes. Raises OSError, and TooLarge, without reading, if there are more than `most`."""
        with open(self.path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, "not a regular file", self.path)
            begin, size = self.span or (0, status.st_size)
            if most is not None and size > most:
                raise TooLarge(size)
            file.seek(begin)
            data = file.read(size)
        if self.span is not None and len(data) < size:
            raise OSError(f"{self.path} ends within it")
        return data


class _FileGroup:
    """Files below a folder, with ids relative to it; or, without a folder, under the names given."""

    def __init__(self, folder: str, names: list[str]) -> None:
        self._folder = folder
        self.ids = names

    def item(self, index: int) -> ImageRef:
        name = self.ids[index]
        inner = name if self._folder else os.path.basename(name)  # noqa: PTH119 - see ImageRef.read
        return ImageRef(name, os.path.join(self._folder, name), None, _without_ending(inner))  # noqa: PTH118


class _TarGroup:
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

    def item(self, index: int) -> ImageRef:
        sample = self.ids[index]
        begin, size = self._spans[2 * index : 2 * index + 2]
        return ImageRef(sample, self._path, (begin, size), f"{self._stem}/{sample[self._prefix :]}")


class Images(Sequence[ImageRef]):
    """All images, in order. Raises SourceError if two have the same id."""

    def __init__(self, groups: Sequence[_FileGroup | _TarGroup]) -> None:
        self._groups = groups
        self._ends = list(accumulate(len(group.ids) for group in groups))
        known: set[str] = set()
        for index, name in enumerate(self.ids()):
            if name in known:
                first = next(other for other, earlier in enumerate(self.ids()) if earlier == name)
                raise SourceError(
                    f"two images have the id {name}: {self._location(first)} and {self._location(index)}; give each "
                    "image once; for different images of the same name use runs with different --out folders"
                )
            known.add(name)

    def ids(self) -> Iterator[str]:
        """Iterate over all ids, in order."""
        return chain.from_iterable(group.ids for group in self._groups)

    def digest(self) -> str:
        """Return the SHA-256 of all ids, in order."""
        digest = hashlib.sha256()
        for name in self.ids():
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRef]: ...
    def __getitem__(self, index: int | slice) -> ImageRef | list[ImageRef]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        group = bisect_right(self._ends, places)
        return self._groups[group].item(places - (self._ends[group - 1] if group else 0))

    def _location(self, index: int) -> str:
        item = self[index]
        return f"{item.path} (image {index})" if item.span is None else f"{item.path} (byte {item.span[0]})"


def find_images(given: Iterable[str], lists: Iterable[Path] = ()) -> Images:
    """Return the images of folders, files, globs, tar shards and brace ranges, then those that the files `lists` name.

    Raises SourceError for sources that do not exist or contain no image, and OSError.
    """
    groups: list[_FileGroup | _TarGroup] = []
    for source in given:
        for path in _expanded(source):
            groups.extend(_of_folder(path) if os.path.isdir(path) else _of_files([path]))  # noqa: PTH112
    for file in lists:
        # Not splitlines: names may contain other line separators, such as U+2028.
        lines = [line.removesuffix("\r") for line in os.fsdecode(file.read_bytes()).split("\n")]
        if any("\0" in line for line in lines):
            raise SourceError(f"{file} is no list of images: it contains null bytes, which names cannot")
        groups.extend(_of_files([line for line in lines if line.strip()]))
    images = Images(groups)
    if not images:
        raise SourceError(f"the list holds no image: {', '.join(map(str, lists))}")
    return images


def _expanded(source: str) -> list[str]:
    """Return the paths that a source stands for: itself, if it exists."""
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
    """Yield the names of a brace range like bash: of `a-{08..10}.tar` a-08.tar, a-09.tar and a-10.tar."""
    found = _RANGE.search(pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if int(first) <= int(last) else -1
    for number in range(int(first), int(last) + step, step):
        yield from _ranges(f"{pattern[: found.start()]}{number:0{width}}{pattern[found.end() :]}")


def _of_files(paths: list[str]) -> Iterator[_FileGroup | _TarGroup]:
    for path in paths:
        if path.lower().endswith(_PACKED_TARS):
            raise SourceError(f"{path} is a compressed tar file, which has no random access; decompress it first")
    return _groups("", paths)


def _of_folder(folder: str) -> Iterator[_FileGroup | _TarGroup]:
    names = sorted(_below(folder))
    if not names:
        raise SourceError(f"{folder} holds no image ({', '.join(EXTENSIONS)}) and no uncompressed tar shard")
    return _groups(folder, names)


def _groups(folder: str, names: list[str]) -> Iterator[_FileGroup | _TarGroup]:
    """Yield groups of files below `folder` ("" for the current one); consecutive plain files share a group."""
    for is_tar, run in groupby(names, key=lambda name: name.lower().endswith(_TAR)):
        if is_tar:
            yield from (_shard(os.path.join(folder, name), name) for name in run)  # noqa: PTH118
        else:
            yield _FileGroup(folder, list(run))


def _below(folder: str) -> Iterator[str]:
    """Yield the names of images and shards, except hidden ones. Links to folders are followed, but not in a cycle."""
    waiting = [(folder, "", frozenset[tuple[int, int]]())]
    while waiting:
        path, prefix, above = waiting.pop()
        status = os.stat(path)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
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


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _shard(path: str, name: str) -> _TarGroup:
    shard = _TarGroup(path, name)
    if not shard.ids:
        raise SourceError(f"{path} holds no sample with an image ({', '.join(EXTENSIONS)})")
    return shard


def _samples(path: str) -> Iterator[tuple[str, int, int]]:
    """Yield key, first byte and length of the image of each sample that has one.

    As in webdataset, a sample is adjacent members whose names agree up to the first dot of the last part
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
    """Yield name, first byte and length of each regular member. Raises SourceError for a damaged file, and OSError."""
    with open(path, "rb") as file:  # noqa: PTH123
        nbytes = os.fstat(file.fileno()).st_size
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
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
            if error.errno != errno.EINVAL:  # EINVAL is of a seek to an absurd offset
                raise OSError(error.errno, error.strerror, path) from None
            raise SourceError(f"{path} is a damaged tar file: {error.strerror}") from None
        except Exception as error:  # absurd headers make tarfile raise many kinds of errors
            raise SourceError(f"{path} is no tar file, or a damaged one: {error}") from None
        # tarfile takes an unreadable header for the end of the file.
        file.seek(max(end, 0))
        rest = file.read(_TAR_BLOCK)
    if rest.strip(b"\0"):
        raise SourceError(f"{path} is a damaged tar file: at byte {end} is neither a member nor the end")


def _without_ending(name: str) -> str:
    stem, ending = os.path.splitext(name)  # noqa: PTH122
    return stem if ending.lower() in _ENDINGS else name
