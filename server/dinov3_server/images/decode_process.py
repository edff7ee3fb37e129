"""A process that decodes: what it is asked for comes through a socket, and so does what becomes of it.

It holds one picture at a time, in the memory and processor time that the asker allows, and may be killed at any
moment. Nothing that it says is trusted: should a file get the better of a decoder, it has this process, which holds
no other picture, no arena and no connection.

A message is its length (4 bytes, little-endian) and JSON. A job is a message and the file; the answer of a measurement
is its size, that of a transform the bytes of each row, a message before them. Either may be an error instead, at any
point, which ends the job.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import astuple
from io import BufferedReader
from pathlib import Path
from typing import Any

from dinov3_server.errors import InvalidInput
from dinov3_server.images.decode import decode, describe, probe
from dinov3_server.images.preprocess import Box, Transform, check_box, transform_into
from dinov3_server.signals import die_with


def pack(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("<I", len(data)) + data


def pack_transform(transform: Transform) -> list[Any]:
    return list(astuple(transform))


def _unpack_transform(packed: list[Any]) -> Transform:
    size, interpolation, crop, flip = packed
    return Transform(tuple(size) if size else None, interpolation, Box(*crop) if crop else None, flip)


def main() -> None:
    """`decode_process DESCRIPTOR PARENT`: serve until the other end of the socket is closed."""
    descriptor, parent = map(int, sys.argv[1:])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the supervisor alone
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # where memory runs out all the same, the kernel is to take this process first
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
            size = probe(data, max_pixels=job["max_pixels"], apply_exif_orientation=job["exif"])
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
        told = {"error": str(error), "field": error.field if isinstance(error, InvalidInput) else ""}
        if MemoryError in (type(error), type(error.__cause__)):
            told["error"] = f"{describe(data)} takes more than {job['nbytes']} bytes of memory, too many for its size"
        channel.sendall(pack(told))


def _limit(nbytes: int, seconds: int) -> None:
    """From now on, of memory and of processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, resource.RLIM_INFINITY))
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + 1 + seconds, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
