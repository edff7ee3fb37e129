"""The images of an extraction: where each is, and what it is called."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import BinaryIO, NamedTuple, overload

from dinov3_client.bulk import remote, tars
from dinov3_client.bulk.endings import TAR, without_ending
from dinov3_client.bulk.errors import SourceError, TooLarge
from dinov3_client.bulk.left_out import LeftOut
from dinov3_client.bulk.remote import Entry, RemoteFile, Store


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A reference to one image, not yet read."""

    id: str
    """Unique in its extraction."""
    path: str
    """The file, or the tar file that contains it; of a remote one the URL without credentials."""
    span: tuple[int, int] | None
    """First byte and length within a tar file; None of a plain file."""
    stem: str
    """Relative path, without extension, of a file named after it; not necessarily unique."""
    remote: RemoteFile | None = None
    """Where to read `path` if it is a URL."""

    @property
    def source(self) -> str:
        """The location to show in messages."""
        return self.path if self.span is None else self.id

    def read(self, most: int | None = None) -> bytes:
        """Read its bytes. Raises OSError, and TooLarge, without reading, if there are more than `most`."""
        data = self._read_local(most) if self.remote is None else self.remote.read(self.span, most)
        if self.span is not None and len(data) < self.span[1]:
            raise OSError(f"{self.path} ends within it")
        return data

    def _read_local(self, most: int | None) -> bytes:
        with open(self.path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.ENXIO, "not a regular file", self.path)
            begin, size = self.span or (0, status.st_size)
            if most is not None and size > most:
                raise TooLarge(size)
            file.seek(begin)
            return file.read(size)


class Listed(NamedTuple):
    """The list that names files, and the line of each."""

    source: str
    lines: Sequence[int]


class FileGroup:
    """Files below a folder, with ids relative to it; or, without a folder, under the names given."""

    def __init__(self, folder: str, names: list[str], listed: Listed | None) -> None:
        self._folder = folder
        self._listed = listed
        self.ids = names

    def item(self, index: int) -> ImageRef:
        name = self.ids[index]
        inner = name if self._folder else os.path.basename(name)  # noqa: PTH119 - see ImageRef.read
        return ImageRef(name, os.path.join(self._folder, name), None, without_ending(inner))  # noqa: PTH118

    def place(self, index: int) -> str:
        """Return the line of the list that names an image, or ""."""
        return f"line {self._listed.lines[index]} of {self._listed.source}" if self._listed else ""


class RemoteGroup(FileGroup):
    """Files of a store; `folder` is the URL that their ids are relative to, or ""."""

    def __init__(
        self, folder: str, names: list[str], listed: Listed | None, store: Store, entries: Iterable[Entry]
    ) -> None:
        super().__init__(folder, names, listed)
        self._store = store
        self._paths: list[str] = []
        self._sizes = array("q")  # -1 if unknown
        for path, size in entries:
            self._paths.append(path)
            self._sizes.append(-1 if size is None else size)

    def item(self, index: int) -> ImageRef:
        path, size = self._paths[index], self._sizes[index]
        file = RemoteFile(self._store, Entry(path, None if size < 0 else size))
        return replace(super().item(index), path=self._store.url(path), remote=file)


class TarGroup:
    """The samples of a tar file that have an image. `file` is where to read it if `path` is a URL."""

    def __init__(
        self, path: str, name: str, image_keys: Sequence[str], left_out: LeftOut, file: RemoteFile | None = None
    ) -> None:
        self._path = path
        self._stem = os.path.basename(name).removesuffix(TAR)  # noqa: PTH119
        self._spans = array("Q")
        self._file = file
        self.ids: list[str] = []
        of_this = LeftOut()

        def opened() -> BinaryIO:
            return open(path, "rb") if file is None else file.open()  # noqa: PTH123

        for sample in tars.samples(path, opened, image_keys, of_this):
            self.ids.append(f"{name}:{sample.name}")
            self._spans.extend((sample.image.begin, sample.image.size))
        if not self.ids:
            raise tars.no_sample(path, image_keys, of_this)
        left_out.update(of_this)
        self._prefix = len(name) + 1

    def item(self, index: int) -> ImageRef:
        sample = self.ids[index]
        begin, size = self._spans[2 * index : 2 * index + 2]
        return ImageRef(sample, self._path, (begin, size), f"{self._stem}/{sample[self._prefix :]}", self._file)

    def place(self, index: int) -> str:
        """Return where an image is in the file."""
        return f"byte {self._spans[2 * index]}"


Group = FileGroup | TarGroup


class Images(Sequence[ImageRef]):
    """All images, in order. Raises SourceError if two have the same id."""

    def __init__(
        self, groups: Sequence[Group], image_keys: Sequence[str] = (), left_out: LeftOut | None = None
    ) -> None:
        self.left_out = left_out or LeftOut()
        """What the sources hold besides."""
        self._groups = groups
        self._image_keys = image_keys
        self._ends = list(accumulate(len(group.ids) for group in groups))
        known: set[str] = set()
        for index, name in enumerate(self.ids()):
            if name in known:
                first = next(other for other, earlier in enumerate(self.ids()) if earlier == name)
                raise SourceError(
                    f"two images have the id {name}: {self._location(first)} and {self._location(index)}; give each "
                    "image once; for different images of the same name use runs with different --out folders"
                    + (" (an id has no query: it may hold credentials)" if remote.is_web(name) else "")
                )
            known.add(name)

    @property
    def remote(self) -> bool:
        """Whether some images are at URLs."""
        return any(len(group.ids) and group.item(0).remote is not None for group in self._groups)

    def ids(self) -> Iterator[str]:
        """Iterate over all ids, in order."""
        return chain.from_iterable(group.ids for group in self._groups)

    def digest(self) -> str:
        """Return the SHA-256 of all ids, in order, and of the image keys, which choose among a sample's members."""
        digest = hashlib.sha256()
        for name in self.ids():
            digest.update(os.fsencode(name) + b"\0")
        for key in self._image_keys:
            digest.update(b"\0" + os.fsencode(key))
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
        group, inner = self._place(places)
        return group.item(inner)

    def _place(self, index: int) -> tuple[Group, int]:
        group = bisect_right(self._ends, index)
        return self._groups[group], index - (self._ends[group - 1] if group else 0)

    def _location(self, index: int) -> str:
        group, inner = self._place(index)
        return f"{group.item(inner).path} ({group.place(inner) or f'image {index}'})"


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file; a pipe too, without waiting for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)
