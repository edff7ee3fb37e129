"""What the commands share: the server's flags, messages on stderr, lists of numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dinov3_client._checks import check_deadline
from dinov3_client._client import Client
from dinov3_client._model import Model
from dinov3_client._text import printable
from dinov3_client.bulk.errors import SourceError
from dinov3_client.bulk.sources import Images, find

DEFAULT_TARGET = "localhost:50051"


class UsageError(Exception):
    """What argparse cannot see by itself."""


class Failures:
    """Says each on stderr as it comes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, image: str, reason: str) -> None:
        self.say(f"{image}: {reason}")

    def say(self, text: str) -> None:
        self.count += 1
        complain(text)


def found_images(sources: Iterable[str], failures: Failures) -> Iterator[Images]:
    """Of each source, in their order: a file, folder, glob or tar shard. One that is none of these is told of."""
    for source in sources:
        try:
            yield find([source])
        except SourceError as error:
            failures.say(str(error))


def connect(args: argparse.Namespace) -> Client:
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
        raise UsageError(f"--token-file {args.token_file}: it holds no token: other characters than ASCII") from None
    except ValueError as error:
        raise UsageError(str(error)) from None


def known_model(client: Client) -> Model:
    model = client.model()
    if model.random_weights:
        complain(f"note: the server's weights are random ({model.weights}): its features have no meaning")
    return model


def layer_numbers(asked: Sequence[int], model: Model) -> tuple[int, ...]:
    """As numbers from 0 on, so that a file's names say the same whatever the model's depth."""
    for layer in asked:
        if not -model.depth <= layer < model.depth:
            raise UsageError(f"layer {layer}: {model.name} has the layers 0 to {model.depth - 1}")
    return tuple(dict.fromkeys(layer % model.depth for layer in asked))


def server_flags() -> argparse.ArgumentParser:
    """The flags of every command that speaks to a server, as a parent parser."""
    server = argparse.ArgumentParser(add_help=False)
    group = server.add_argument_group("server")
    group.add_argument(
        "--target",
        default=os.environ.get("DINOV3_TARGET", DEFAULT_TARGET),
        metavar="HOST:PORT",
        help="environment: DINOV3_TARGET; now %(default)s",
    )
    group.add_argument(
        "--deadline",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="of one call, with all that it waits for a busy or absent server (default %(default)g)",
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with the server's token; or environment: DINOV3_TOKEN"
    )
    group.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM file that vouches for the server; without it, plain text"
    )
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM file with a certificate of the client's own")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM file with its private key")
    return server


def add_size(parser: argparse.ArgumentParser, default: tuple[int, int] | None, named: str) -> None:
    parser.add_argument(
        "--size",
        type=image_size,
        default=default,
        metavar="N|HxW",
        help=f"pixels of the model's input, multiples of its patch size; default: {named}",
    )


def image_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 2**32 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 512 and 384x512 (height x width) are")
    return int(sides[0]), int(sides[-1])


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; 3,7,-1 is one") from None


def seconds(text: str) -> float:
    try:
        return check_deadline(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds") from None


def say(line: str) -> None:
    # Names of files and texts of servers may hold anything.
    sys.stdout.write(printable(line) + "\n")


def complain(line: str) -> None:
    sys.stderr.write(f"dinov3-client: {printable(line)}\n")
