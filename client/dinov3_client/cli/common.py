"""Shared by the commands: the server's flags, messages, argument types."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

from dinov3_client._checks import check_deadline
from dinov3_client._client import Client
from dinov3_client._errors import Unauthenticated
from dinov3_client._fit import Fit, read_color
from dinov3_client._model import Model
from dinov3_client._text import printable
from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.images import Images
from dinov3_client.bulk.sources import find_images
from dinov3_serving.images import Color
from dinov3_serving.presets import FitMethod

DEFAULT_TARGET = "localhost:50051"
_ARGUMENTS = re.compile(r"\btls_(?:ca|cert|key)\b|^target(?= )|\b(?:deadline|on_error)(?==)")


class UsageError(Exception):
    """A usage error that argparse does not detect itself."""


class FailureLog:
    """Reports failed images on stderr, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, image: str, reason: str) -> None:
        self.log(f"{image}: {reason}")

    def log(self, text: str) -> None:
        self.count += 1
        print_error(text)


def iter_images(sources: Iterable[str], failures: FailureLog) -> Iterator[Images]:
    """Yield the images of each source (file, folder, glob or tar shard); log sources that are invalid."""
    for source in sources:
        try:
            yield find_images([source])
        except SourceError as error:
            failures.log(str(error))


def connect(args: argparse.Namespace) -> Client:
    """Make the client that the server's flags describe."""
    try:
        token = args.token_file.read_text("ascii").strip() if args.token_file else os.environ.get("DINOV3_TOKEN")
        return Client(
            args.target,
            deadline=args.deadline,
            token=token,
            tls_ca=args.tls_ca,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
        )
    except UnicodeDecodeError:
        raise UsageError(f"--token-file {args.token_file}: a token has ASCII characters only") from None
    except ValueError as error:
        raise UsageError(in_flags(str(error))) from None


def in_flags(message: str) -> str:
    """Return a message of the client with the command's flags in place of the names of Python's arguments."""
    return _ARGUMENTS.sub(lambda found: f"--{found[0].replace('_', '-')}", message)


def describe(error: Exception) -> str:
    """Return an error of a call in the command's words."""
    if isinstance(error, Unauthenticated):
        reason = error.message.partition(": send the metadata")[0]
        return f"{reason}: give the server's token by --token-file FILE or by the environment variable DINOV3_TOKEN"
    return in_flags(str(error))


def get_model(client: Client) -> Model:
    """Return the server's model, with a note on stderr if its weights are random."""
    model = client.model()
    if model.random_weights:
        print_error(f"note: the server's weights are random ({model.weights}): the features are meaningless")
    return model


def layer_numbers(asked: Sequence[int], model: Model) -> tuple[int, ...]:
    """Return non-negative layer numbers, so that names in files do not depend on the model's depth."""
    for layer in asked:
        if not -model.depth <= layer < model.depth:
            raise UsageError(f"layer {layer}: {model.name} has the layers 0 to {model.depth - 1}")
    return tuple(dict.fromkeys(layer % model.depth for layer in asked))


def server_flags() -> argparse.ArgumentParser:
    """Return a parent parser with the flags of all commands that call a server."""
    server = argparse.ArgumentParser(add_help=False)
    group = server.add_argument_group("server")
    group.add_argument(
        "--target",
        default=os.environ.get("DINOV3_TARGET") or DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="the server, or several separated by commas; default: %(default)s (environment: DINOV3_TARGET)",
    )
    group.add_argument(
        "--deadline",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="of one call, including waits for a busy or absent server; default: %(default)g",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the access token (environment: DINOV3_TOKEN)"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM file with the server's authority; default: no TLS"
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM file with the client's certificate")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file with the client's private key")
    return server


def add_size_flag(parser: argparse.ArgumentParser, default: tuple[int, int] | None, default_text: str) -> None:
    """Add --size."""
    parser.add_argument(
        "--size",
        type=image_size,
        default=default,
        metavar="N|HxW",
        help=f"size of the model's input in pixels, multiples of its patch size; default: {default_text}",
    )


def add_picture_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags for decoding files."""
    parser.add_argument("--exif", action="store_true", help="rotate images by their EXIF orientation first")
    parser.add_argument(
        "--background",
        type=_color,
        metavar="COLOR",
        help="color under transparent pixels, such as white or '#7c7468'; default: alpha is dropped",
    )
    parser.add_argument(
        "--allow-truncated", action="store_true", help="decode files whose end is missing, as far as they go"
    )


def add_fit_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags for images of another aspect ratio than the model's input; `fit_of` reads them."""
    parser.add_argument(
        "--fit",
        choices=get_args(FitMethod),
        default="stretch",
        help="for images of another aspect ratio than the input: stretch them, resize and crop their center, or resize "
        "and pad them (default: %(default)s)",
    )
    parser.add_argument("--pad-color", type=_color, metavar="COLOR", help="of --fit pad; default: black")
    parser.add_argument(
        "--resize-shorter",
        type=int,
        metavar="N",
        help="pixels of the shorter side before --fit crop, such as 256 with --size 224; default: as few as cover the "
        "input",
    )


def fit_of(args: argparse.Namespace) -> Fit:
    """Return the fit that the flags describe. Raises UsageError."""
    try:
        return Fit(args.fit, args.pad_color, args.resize_shorter)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _color(text: str) -> Color:
    try:
        return read_color("it", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a color, such as white or '#7c7468'") from None


def image_size(text: str) -> tuple[int, int]:
    """Parse N or HxW to (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 2**32 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 512 or 384x512 (height x width)")
    return int(sides[0]), int(sides[-1])


def layer_list(text: str) -> tuple[int, ...]:
    """Parse comma-separated layer numbers."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers, such as 3,7,-1") from None


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    try:
        return check_deadline(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds") from None


def print_line(line: str) -> None:
    """Print a line; names of files and texts of servers in it are made printable."""
    sys.stdout.write(printable(line) + "\n")


def print_error(line: str) -> None:
    """Print a line to stderr, made printable."""
    sys.stderr.write(f"dinov3-client: {printable(line)}\n")


def report_interrupt(args: argparse.Namespace) -> None:
    """Say that a signal ends the command."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")  # after a progress message, or the terminal's ^C
    print_error("interrupted")
