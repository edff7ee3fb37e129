"""Lists the images of tar files: webdataset shards, or folders that were packed."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import BinaryIO, NamedTuple

from dinov3_client.bulk.endings import EXTENSIONS, is_image
from dinov3_client.bulk.errors import SourceError, StoreError
from dinov3_client.bulk.left_out import LeftOut

EACH = "*"
"""As the image key: each image is a sample of its own."""

_TAR_BLOCK = 512
# webdataset skips these: `skip_meta` in webdataset/tariterators.py.
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """A regular member of a tar file, or a link to one."""

    name: str
    begin: int
    """The first byte of its contents."""
    size: int

    def __str__(self) -> str:
        return f"{self.name} (byte {self.begin})"


class Sample(NamedTuple):
    """A sample that has an image."""

    name: str
    """Unique in its tar file."""
    image: Member


class _Part(NamedTuple):
    """A member as webdataset sees it: the name is `sample` + "." + `key`."""

    sample: str
    key: str
    """All after the first dot of the last part of the name, in lower case."""
    member: Member


def samples(
    path: str, open_file: Callable[[], BinaryIO], image_keys: Sequence[str], left_out: LeftOut
) -> Iterator[Sample]:
    """Yield the image of each sample that has one, in the order of the file; count the rest in `left_out`.

    As in webdataset, a sample is adjacent members whose names agree up to the first dot of the last part, and the rest
    of the name, in lower case, is a member's key (`base_plus_ext` and `group_by_keys` in webdataset/tariterators.py).
    The image is the member of the first of `image_keys` that the sample has; without keys, the single one whose name
    ends as that of an image. With (EACH,) all of these are images, each a sample named without its last ending.

    Raises SourceError for a damaged file, an ambiguous sample and two samples of one name, and OSError.
    """
    known: dict[str, Member] = {}
    for sample in _samples(path, open_file, image_keys, left_out):
        first = known.setdefault(sample.name, sample.image)
        if first is not sample.image:
            raise SourceError(f"{path}: two images have the name {sample.name}: {first} and {sample.image}")
        yield sample


def _samples(
    path: str, open_file: Callable[[], BinaryIO], image_keys: Sequence[str], left_out: LeftOut
) -> Iterator[Sample]:
    def seen(member: Member) -> None:
        left_out.add(member.name, path)

    parts = (part for member in _members(path, open_file, left_out) if (part := _part(member, seen)))
    if tuple(image_keys) == (EACH,):
        for part in parts:
            if is_image(part.member.name):
                yield Sample(posixpath.splitext(part.member.name)[0], part.member)
            else:
                seen(part.member)
        return
    for name, run in groupby(parts, key=lambda part: part.sample):
        of_sample = list(run)
        chosen = _chosen(path, name, of_sample, image_keys)
        for part in of_sample:
            if part is not chosen:
                seen(part.member)
        if chosen:
            yield Sample(name, chosen.member)


def _part(member: Member, seen: Callable[[Member], None]) -> _Part | None:
    folder, slash, last = member.name.rpartition("/")
    stem, dot, key = last.partition(".")
    if not stem or not dot or _META.match(member.name):
        seen(member)
        return None
    return _Part(f"{folder}{slash}{stem}", key.lower(), member)


def _chosen(path: str, name: str, parts: Sequence[_Part], image_keys: Sequence[str]) -> _Part | None:
    """Return the image of a sample, or None."""
    if image_keys:
        found = next((same for key in image_keys if (same := [part for part in parts if part.key == key])), [])
    else:
        found = [part for part in parts if is_image(part.member.name)]
    if len(found) < 2:
        return found[0] if found else None
    first, second = found[:2]
    both = f"{first.member} and {second.member}"
    if first.key == second.key:
        raise SourceError(f"{path}: the sample {name} has two members of the key {first.key!r}: {both}")
    raise SourceError(
        f"{path}: the sample {name} has several images, {both}: choose one of each sample with --image-key, such as "
        f"{first.key!r} ('jpg;png' is the first that a sample has), or take each image as a sample of its own with "
        f"--image-key '{EACH}'"
    )


def parse_image_keys(text: str) -> tuple[str, ...]:
    """Return the keys of a text such as "jpg;png" or "jpg,png", as webdataset compares them: in lower case.

    Raises ValueError.
    """
    keys = tuple(key.strip().lower().removeprefix(".") for key in re.split("[;,]", text))
    if not all(keys) or any("/" in key for key in keys) or (EACH in keys and len(keys) > 1):
        raise ValueError(
            f"{text!r} is no key of a tar sample: give what follows the first dot of the members' names, such as jpg "
            f"or input.png; several as 'jpg;png', where the first that a sample has counts; or '{EACH}' for each image"
        )
    return keys


class _Link(NamedTuple):
    name: str
    target: str
    """The name of the member that it leads to."""


class _Other(NamedTuple):
    name: str
    kind: str


def _members(path: str, open_file: Callable[[], BinaryIO], left_out: LeftOut) -> Iterator[Member]:
    """Yield the files of a tar file, in order; links to them too, as the files that they lead to.

    Other links are counted in `left_out`.
    """
    entries = list(_entries(path, open_file))
    files = {entry.name: entry for entry in entries if isinstance(entry, Member)}
    links = {entry.name: entry.target for entry in entries if isinstance(entry, _Link)}
    for entry in entries:
        if isinstance(entry, Member):
            yield entry
            continue
        if isinstance(entry, _Other):
            left_out.add_kind(entry.kind, f"{path}:{entry.name}")
            continue
        target, passed = entry.target, {entry.name}
        while target not in files and target in links and target not in passed:
            passed.add(target)
            target = links[target]
        if target in files:
            yield files[target]._replace(name=entry.name)
        else:
            left_out.add_kind("links to no file of their tar", f"{path}:{entry.name}")


def _entries(path: str, open_file: Callable[[], BinaryIO]) -> Iterator[Member | _Link | _Other]:
    """Yield all members but folders. Raises SourceError for a damaged file, and OSError."""
    with open_file() as file:
        nbytes = file.seek(0, os.SEEK_END)
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps all of them
                    if tar.offset <= end or member.size < 0:
                        raise SourceError(f"{path} is a damaged tar file: {member.name} has {member.size} bytes")
                    end = tar.offset
                    if entry := _entry(path, member, nbytes):
                        yield entry
                end = tar.offset
        except (SourceError, StoreError):
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


def _entry(path: str, member: tarfile.TarInfo, nbytes: int) -> Member | _Link | _Other | None:
    name = member.name.removeprefix("./")
    if member.islnk():
        return _Link(name, posixpath.normpath(member.linkname))
    if member.issym():
        return _Link(name, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)))
    if member.isdir():
        return None
    if not member.isreg():
        return _Other(name, "special files")
    if member.sparse is not None:
        if is_image(name):
            raise SourceError(f"{path} has {member.name} as a sparse file; make it without --sparse")
        return _Other(name, "sparse files")
    if member.offset_data + member.size > nbytes:
        raise SourceError(
            f"{path} is a damaged tar file: {member.name} of {member.size} bytes, from byte {member.offset_data} on, "
            f"goes beyond its end at {nbytes}"
        )
    return Member(name, member.offset_data, member.size)


def no_sample(path: str, image_keys: Sequence[str], left_out: LeftOut) -> SourceError:
    """Return the error for a tar file without an image."""
    if image_keys and tuple(image_keys) != (EACH,):
        wanted = f"with the key {' or '.join(map(repr, image_keys))} (--image-key)"
    else:
        wanted = f"with an image ({', '.join(EXTENSIONS)})"
    return SourceError(f"{path} holds no sample {wanted}{f'; left out: {left_out}' if str(left_out) else ''}")
