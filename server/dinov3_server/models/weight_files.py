"""Names of weights files, the index of shards, and detection of web pages that were saved as weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dinov3_server.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SNIFFED_BYTES = 512

_MAX_INDEX = 100_000_000  # bytes; ViT-7B's has some 50,000
_BLANK = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and white space
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--", b"<error")
_MARKUP_TYPES = ("text/html", "application/xhtml+xml", "text/xml", "application/xml")
_LISTED = 8


def enumerate_some(items: Iterable[str]) -> str:
    """Join the first few of `items` with commas, and say how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def is_json(head: bytes) -> bool:
    """Return whether a file is JSON, by its first bytes.

    A safetensors file may begin with a brace too, in the length of its header, but zeros follow it.
    """
    return head.lstrip(_BLANK).startswith(b"{") and b"\0" not in head[:8]


def is_web_page(head: bytes, content_type: str = "") -> bool:
    """Return whether a file is an HTML or XML page, by its first bytes or Content-Type; weights hold a zero byte."""
    head = head[:SNIFFED_BYTES].lstrip(_BLANK).lower()
    return head.startswith(_MARKUP) or (content_type in _MARKUP_TYPES and b"\0" not in head)


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index of shards: the file name of each tensor's shard, by the tensor's name.

    The format (https://huggingface.co/docs/huggingface_hub/package_reference/serialization) is a JSON object whose
    `weight_map` has these. Its `metadata.total_size` is ignored: writers count the memory that tensors were views of,
    and each shard's own header accounts for every byte. Raises CheckpointError, also for a file outside the index's own
    folder.
    """
    try:
        size = index.stat().st_size
        if size > _MAX_INDEX:
            raise CheckpointError(f"{index}: {size} bytes of JSON, too many for an index of shards")
        parsed: Any = json.loads(index.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: an index of shards that is not JSON, or truncated: {error}") from None
    if not isinstance(parsed, dict) or "weight_map" not in parsed:
        raise CheckpointError(f"{index}: is JSON, not weights, and no index of shards either: it has no weight_map")
    weight_map = parsed["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: the weight_map is not an object with a file name for each tensor")
    if bad := [repr(name) for name in weight_map.values() if not is_plain_name(name)]:
        raise CheckpointError(
            f"{index}: the weight_map names {enumerate_some(dict.fromkeys(bad))}; allowed are plain names of files in "
            "the index's own folder"
        )
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def is_plain_name(name: object) -> bool:
    """Return whether `name` is the name of a file, without a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and name.isprintable() and not set(name) & set("/\\")
