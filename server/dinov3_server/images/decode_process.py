"""The main module of a decode process, which receives jobs and returns pixels through a socket.

It holds one image at a time, within the memory and processor time that each job allows, and may be killed at any time.
Its answers are not trusted: a file that exploits a decoder controls only this process, which holds no other image, no
arena and no connection.

A message is its length (4 bytes, little-endian) and JSON. A job is a message, followed by the file. The answer to a
size request is one message; the answer to a transform is, for each row, a message and its pixels. A message with an
error may take the place of any answer, and ends the job.
"""

from __future__ import annotations

import json
import resource
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import astuple
from io import BufferedReader
from pathlib import Path
from typing import Any

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import decode, describe, read_size
from dinov3_server.images.preprocess import transform_into
from dinov3_server.signals import die_with, leave_to_supervisor
from dinov3_serving.images import Box, Transform, check_box


def pack(message: dict[str, Any]) -> bytes:
    """Return a message's length and JSON."""
    data = json.dumps(message).encode()
    return struct.pack("<I", len(data)) + data


def pack_transform(transform: Transform) -> list[Any]:
    return list(astuple(transform))


def _unpack_transform(packed: list[Any]) -> Transform:
    size, interpolation, crop, flip = packed
    return Transform(tuple(size) if size else None, interpolation, Box(*crop) if crop else None, flip)


def main() -> None:
    """Run `decode_process DESCRIPTOR PARENT`: serve jobs until the other end of the socket is closed."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    leave_to_supervisor()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # if memory runs out, the kernel kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as reader:
        channel.sendall(pack({}))  # ready
        while head := reader.read(4):
            _serve(json.loads(reader.read(*struct.unpack("<I", head))), reader, channel)


def _serve(job: dict[str, Any], reader: BufferedReader, channel: socket.socket) -> None:
    data = reader.read(job["file_bytes"])
    _limit(job["nbytes"], job["seconds"])
    try:
        if job["rows"] is None:
            size = read_size(data, max_pixels=job["max_pixels"], apply_exif_orientation=job["exif"])
            channel.sendall(pack({"size": size}))
            return
        image = decode(data, max_pixels=job["max_pixels"], apply_exif_orientation=job["exif"])
        rows = [(row["field"], _unpack_transform(row["transform"])) for row in job["rows"]]
        for field, transform in rows:
            if transform.crop:
                check_box(transform.crop, (image.height, image.width), f"{field}.crop")
        for _, transform in rows:
            height, width = transform.size or (transform.crop[2:] if transform.crop else (image.height, image.width))
            out = bytearray(height * width * 3)
            transform_into(image, transform, memoryview(out))
            channel.sendall(pack({"row_bytes": len(out)}))
            channel.sendall(out)
    except (InvalidInput, MemoryError) as error:
        message = {"error": str(error), "field": error.field if isinstance(error, InvalidInput) else ""}
        if MemoryError in (type(error), type(error.__cause__)):
            message["error"] = (
                f"{describe(data)} takes more than {job['nbytes']} bytes of memory, too many for its size"
            )
        channel.sendall(pack(message))


def _limit(nbytes: int, seconds: int) -> None:
    """Limit the process to `nbytes` more memory and `seconds` more processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, resource.RLIM_INFINITY))
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1 + seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
