"""The main module of a decode process, which receives jobs and returns pixels through a socket.

It holds one image at a time, within the memory and processor time that each job allows, and may be killed at any time.
Its answers are not trusted: a file that exploits a decoder controls only this process, which holds no other image, no
arena and no connection.

A message is its length (4 bytes, little-endian) and its content: a pickled `Job`, followed by the file, or an answer in
JSON. The answer to a job without rows is one message with the size; else it is, for each row, a message and its pixels.
A message with an error may take the place of any answer, and ends the job.
"""

from __future__ import annotations

import json
import pickle
import resource
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import File
from dinov3_server.images.formats import describe
from dinov3_server.images.preprocess import transform_into
from dinov3_server.signals import die_with, leave_to_supervisor
from dinov3_serving.images import RowSpec, check_crops


class Job(NamedTuple):
    """Decode `file`, whose data follow the job, and transform it to `rows`; without rows, only read its size.

    `nbytes` and `seconds` (of processor time) are limits.
    """

    file: File
    file_bytes: int
    rows: Sequence[RowSpec]
    nbytes: int
    seconds: int


def pack(content: bytes) -> bytes:
    """Return a message: its length and content."""
    return struct.pack("<I", len(content)) + content


def _pack_answer(**fields: Any) -> bytes:
    return pack(json.dumps(fields).encode())


def main() -> None:
    """Run `decode_process DESCRIPTOR PARENT`: serve jobs until the other end of the socket is closed."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    leave_to_supervisor()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # if memory runs out, the kernel kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as reader:
        channel.sendall(_pack_answer())  # ready
        while head := reader.read(4):
            _serve(Job(*pickle.loads(reader.read(*struct.unpack("<I", head)))), reader, channel)


def _serve(job: Job, reader: BufferedReader, channel: socket.socket) -> None:
    file = job.file._replace(data=reader.read(job.file_bytes))
    _limit(job.nbytes, job.seconds)
    try:
        if not job.rows:
            channel.sendall(_pack_answer(size=file.read_size()))
            return
        image = file.decode()
        check_crops(job.rows, (image.height, image.width))
        for _, _, transform, _ in job.rows:
            height, width = transform.size or (transform.crop[2:] if transform.crop else (image.height, image.width))
            out = bytearray(height * width * 3)
            transform_into(image, transform, memoryview(out))
            channel.sendall(_pack_answer(row_bytes=len(out)))
            channel.sendall(out)
    except (InvalidInput, MemoryError) as error:
        message = str(error)
        if MemoryError in (type(error), type(error.__cause__)):
            message = f"{describe(file.data)} takes more than {job.nbytes} bytes of memory, too many for its size"
        channel.sendall(_pack_answer(error=message, field=getattr(error, "field", "")))


def _limit(nbytes: int, seconds: int) -> None:
    """Limit the process to `nbytes` more memory and `seconds` more processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, resource.RLIM_INFINITY))
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1 + seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
