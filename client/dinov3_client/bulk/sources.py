"""Lists the images of an extraction, in order and with ids.

Order and ids depend on the arguments and on names alone, so that a later run finds the same. An image takes about as
much memory as its id; no files are opened but lists and tar files, whose headers are read.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from dinov3_client.bulk import lists, remote
from dinov3_client.bulk.endings import EXTENSIONS, PACKED_TARS, is_image, is_tar
from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.images import FileGroup, Group, Images, Listed, RemoteGroup, TarGroup
from dinov3_client.bulk.left_out import LeftOut
from dinov3_client.bulk.remote import Entry, RemoteFile, Store

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_images(
    given: Iterable[str],
    listed: Iterable[str | os.PathLike[str]] = (),
    *,
    list_column: str | None = None,
    image_keys: Sequence[str] = (),
) -> Images:
    """Return the images of folders, files, globs, tar shards, brace ranges and URLs, then those that lists name.

    `listed` are lists, "-" for standard input; with `list_column`, CSV files. `image_keys` choose the image of a sample
    in tar files; see tars.samples. Raises SourceError for sources that do not exist or contain no image, and OSError.
    """
    finder = _Finder(image_keys)
    groups: list[Group] = []
    for source in given:
        groups.extend(finder.of_source(source))
    for each in listed:
        groups.extend(finder.of_list(os.fspath(each), list_column))
    images = Images(groups, image_keys, finder.left_out)
    if not images:
        raise SourceError(f"the list holds no image: {', '.join(remote.without_secrets(str(each)) for each in listed)}")
    return images


class _Finder:
    """Finds groups of images, and counts what it leaves out."""

    def __init__(self, image_keys: Sequence[str]) -> None:
        self.left_out = LeftOut()
        self._image_keys = image_keys
        self._stores: dict[str, Store] = {}

    def of_source(self, source: str) -> Iterator[Group]:
        """Yield the groups of a folder, a file, a glob, a tar shard or a brace range, local or at a URL."""
        if remote.is_url(source):
            for url in _ranges(source):
                yield from self._of_url(url)
            return
        for path in _expanded(source):
            if not os.path.isdir(path):  # noqa: PTH112
                yield from self._of_files("", [path])
            elif names := sorted(_below(path, self.left_out)):
                yield from self._of_files(path, names)
            else:
                raise self._no_image(path)

    def of_list(self, source: str, column: str | None) -> Iterator[Group]:
        """Yield the groups of the files that a list names."""
        shown = "standard input" if source == lists.STDIN else remote.without_secrets(source)
        names, lines = lists.parse(self._contents(source), shown, column)
        if remote.is_url(source):
            names = [name if remote.is_url(name) else f"{remote.parent(source)}/{name}" for name in names]
        elif names and source != lists.STDIN:
            _check_base(source, names[0])
        for store, run in groupby(range(len(names)), key=lambda index: self._store(names[index])):
            of_run = list(run)
            found, listed = [names[index] for index in of_run], Listed(shown, [lines[index] for index in of_run])
            if store is None:
                yield from self._of_files("", found, listed)
            else:
                entries = [Entry(store.path(name), None) for name in found]
                yield from self._of_entries(store, "", entries, list(map(remote.without_secrets, found)), listed)

    def _contents(self, source: str) -> bytes:
        if source == lists.STDIN:
            return sys.stdin.buffer.read()
        store = self._store(source)
        if store is not None:
            return store.read(Entry(store.path(source), None), None)
        with open(source, "rb") as file:  # noqa: PTH123
            return file.read()

    def _store(self, name: str) -> Store | None:
        """Return the store of a URL, one for all of a scheme and host; None for a local file."""
        if not remote.is_url(name):
            return None
        key = "web" if remote.is_web(name) else "/".join(name.split("/", 3)[:3])
        if key not in self._stores:
            self._stores[key] = Store(name)
        return self._stores[key]

    def _of_url(self, url: str) -> Iterator[Group]:
        store = self._store(url)
        assert store is not None, "it is a URL"
        path, shown = store.path(url), remote.without_secrets(url)
        is_pattern = store.is_pattern(path)
        kind = None if store.web and is_pattern else store.kind(path)
        if kind == "file":
            yield from self._of_entries(store, "", [Entry(path, None)], [shown])
        elif kind == "directory":
            if store.web and "?" in path:
                raise SourceError(f"{shown}: the URL of a folder has no query")
            begin = len(path.rstrip("/")) + 1
            entries = [each for each in store.below(path) if self._is_wanted(each.path[begin:])]
            if not entries:
                raise self._no_image(shown)
            yield from self._of_entries(store, shown, entries, [each.path[begin:] for each in entries])
        elif not is_pattern:
            raise SourceError(f"there is no file or folder {shown}")
        elif entries := store.matches(path):
            yield from self._of_entries(store, "", entries, [store.url(each.path) for each in entries])
        else:
            raise SourceError(f"no file matches {shown}")

    def _of_files(self, folder: str, names: list[str], listed: Listed | None = None) -> Iterator[Group]:
        """Yield groups of files below `folder` ("" for the current one); consecutive plain files share a group."""
        for of_tars, run in _runs(names):
            found = [names[index] for index in run]
            if of_tars:
                for name in found:
                    yield TarGroup(os.path.join(folder, name), name, self._image_keys, self.left_out)  # noqa: PTH118
            else:
                yield FileGroup(folder, found, _part(listed, run))

    def _of_entries(
        self, store: Store, folder: str, entries: Sequence[Entry], ids: list[str], listed: Listed | None = None
    ) -> Iterator[Group]:
        for of_tars, run in _runs(ids):
            if of_tars:
                for index in run:
                    file = RemoteFile(store, entries[index])
                    yield TarGroup(store.url(file.entry.path), ids[index], self._image_keys, self.left_out, file)
            else:
                of_run = (entries[index] for index in run)
                yield RemoteGroup(folder, [ids[index] for index in run], _part(listed, run), store, of_run)

    def _is_wanted(self, name: str) -> bool:
        """Return whether a file in a folder is an image or a shard; count it otherwise."""
        if any(part.startswith(".") for part in name.split("/")):
            self.left_out.add_kind("hidden", name)
        elif not is_image(name) and not is_tar(name):
            self.left_out.add(name)
        else:
            return True
        return False

    def _no_image(self, folder: str) -> SourceError:
        left_out = f"; left out: {self.left_out}" if str(self.left_out) else ""
        return SourceError(f"{folder} holds no image ({', '.join(EXTENSIONS)}) and no uncompressed tar shard{left_out}")


def _runs(names: Sequence[str]) -> Iterator[tuple[bool, list[int]]]:
    """Yield the places of consecutive names of tar shards, and of consecutive others. Raises SourceError."""
    for name in names:
        if name.lower().endswith(PACKED_TARS):
            raise SourceError(f"{name} is a compressed tar file, which has no random access; decompress it first")
    for of_tars, run in groupby(range(len(names)), key=lambda index: is_tar(names[index])):
        yield of_tars, list(run)


def _part(listed: Listed | None, places: Sequence[int]) -> Listed | None:
    return listed and Listed(listed.source, [listed.lines[place] for place in places])


def _check_base(source: str, first: str) -> None:
    """Raise SourceError if the first name of a list is found beside the list and not in the current folder."""
    folder = os.path.dirname(source)  # noqa: PTH120
    if not os.path.lexists(first) and folder and os.path.lexists(os.path.join(folder, first)):  # noqa: PTH118
        raise SourceError(
            f"{source}: names in a list are relative to the current folder, where there is no {first}; there is one "
            f"beside the list: run the command in {folder}"
        )


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


def _below(folder: str, left_out: LeftOut) -> Iterator[str]:
    """Yield the names of images and shards, except hidden ones. Links to folders are followed, but not in a cycle."""
    waiting = [(folder, "", frozenset[tuple[int, int]]())]
    while waiting:
        path, prefix, above = waiting.pop()
        status = os.stat(path)  # noqa: PTH116
        here = (status.st_dev, status.st_ino)
        if here in above:
            left_out.add_kind("links to a folder above them", prefix)
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.name.startswith("."):
                    left_out.add(name)
                elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # noqa: PTH112
                    waiting.append((entry.path, f"{name}/", above | {here}))
                elif is_image(name) or is_tar(name):
                    yield name
                else:
                    left_out.add(name)
