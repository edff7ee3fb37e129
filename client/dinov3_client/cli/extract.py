"""`dinov3-client extract`: write the features of a data set to files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, get_args

from dinov3_client._errors import Dinov3Error, InvalidRequest, MessageTooLarge, ModelMismatch
from dinov3_client._request import Priority
from dinov3_client.bulk import extraction, manifest, sources
from dinov3_client.bulk.errors import ExtractionError, FolderInUse, SourceError
from dinov3_client.bulk.rows import ExtractionOptions, Format
from dinov3_client.bulk.tars import parse_image_keys
from dinov3_client.cli.common import (
    UsageError,
    add_fit_flags,
    add_picture_flags,
    add_size_flag,
    connect,
    describe,
    fit_of,
    get_model,
    image_size,
    layer_list,
    layer_numbers,
    print_error,
    print_line,
    report_interrupt,
)
from dinov3_serving.features import FeatureDtype, TokenKind
from dinov3_serving.presets import Interpolation, PresetName

STOPPED, REFUSED, IMAGES_FAILED = 1, 2, 3
"""Exit codes; REFUSED is that of wrong usage."""
# The same command would meet them again.
_LASTING = (InvalidRequest, MessageTooLarge, ModelMismatch, ExtractionError)
EXIT_CODES = """exit codes:
  0    all images have features, or no more than --allow-failed have none
  1    stopped (server away, disk full, ...): the same command resumes
  2    refused, and would be again: wrong usage or options, another model, or another extraction in DIR
  3    finished, but some images have no features: see DIR/failed.jsonl
  130  Ctrl-C or SIGTERM: the same command resumes
"""

# Failed images named on stderr; failed.jsonl has all.
_SHOWN_FAILURES = 20
# Between two progress messages: on a terminal, and in a log.
_LIVE_SECONDS, _LOGGED_SECONDS = 0.2, 10.0


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    extract = commands.add_parser(
        "extract",
        parents=[server],
        help="write the features of a data set to files",
        description="Writes the features of all images to DIR, as shards with a manifest (safetensors, which\n"
        "dinov3_client.FeatureDataset reads, or Parquet), or as one npz file per image. Run it again to\n"
        "resume after an interruption of any kind. Broken images are skipped and listed in\n"
        "DIR/failed.jsonl.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    extract.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="folder (recursive), image, webdataset shard (.tar), 'glob*.jpg' or 'shards-{000..099}.tar'; URLs too "
        "(s3://, gs://, hf://, https://, ...), with dinov3-serving[fsspec]",
    )
    extract.add_argument(
        "--list",
        action="append",
        default=[],
        metavar="FILE",
        help="file, or URL, with the name or URL of an image or shard in each line; - is standard input",
    )
    extract.add_argument(
        "--list-column",
        metavar="NAME",
        help="the column of the names; each --list is then a CSV file with a header",
    )
    extract.add_argument(
        "--image-key",
        type=_image_keys,
        default=(),
        metavar="KEY[;KEY...]",
        help="the image of a sample in a tar shard: what follows the first dot of its name, such as jpg or input.png; "
        "of several the first that a sample has; '*' makes each image a sample. Default: a sample's only image",
    )
    extract.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder, made if missing")
    extract.add_argument(
        "--format",
        choices=get_args(Format),
        default="safetensors",
        help="parquet needs dinov3-serving[parquet] (default: %(default)s)",
    )
    extract.add_argument(
        "--shard-rows",
        type=_positive,
        default=4096,
        metavar="N",
        help="most rows of a shard, which also ends at 256 MB (default: %(default)s)",
    )
    extract.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="extract only the I-th of N parts, counted from 1, for a run on N machines; see `dinov3-client merge`",
    )
    add_allow_failed_flag(extract)
    features = extract.add_argument_group("features")
    features.add_argument(
        "--outputs",
        type=_outputs,
        default=("cls", "patches"),
        metavar="KIND,...",
        help="cls, patches, registers; default: cls,patches",
    )
    features.add_argument(
        "--layers",
        type=layer_list,
        default=(),
        metavar="I,...",
        help="layers to extract in addition; negative numbers count from the end (--layers=-4,-1)",
    )
    features.add_argument(
        "--dtype",
        choices=get_args(FeatureDtype),
        default="float16",
        help="int8 has one scale per token; bfloat16 is float32 in parquet, impossible in npz (default: %(default)s)",
    )
    features.add_argument("--pool", type=image_size, metavar="N|HxW", help="average the patches to a grid of this size")
    features.add_argument("--projection", metavar="NAME", help="a projection of the server, applied to the patches")
    images = extract.add_argument_group("images")
    images.add_argument("--preset", choices=get_args(PresetName), default="dinov3", help="default: %(default)s")
    add_size_flag(images, None, "the preset's")
    images.add_argument("--interpolation", choices=get_args(Interpolation), help="default: the preset's")
    add_fit_flags(images)
    add_picture_flags(images)
    requests = extract.add_argument_group("requests")
    requests.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="images in a request (default: %(default)s)"
    )
    requests.add_argument(
        "--in-flight", type=_positive, default=4, metavar="N", help="concurrent requests (default: %(default)s)"
    )
    requests.add_argument(
        "--priority",
        choices=get_args(Priority),
        default="bulk",
        help="bulk gives way to interactive (default: %(default)s)",
    )
    extract.set_defaults(command=_extract, report_interrupt=report_interrupt_and_advise)


def _extract(args: argparse.Namespace) -> int:
    if args.format == "npz" and args.dtype == "bfloat16":
        raise UsageError("--dtype bfloat16 is not possible in npz files; use float16, float32 or int8")
    if not args.sources and not args.list:
        raise UsageError("nothing to extract: give a SOURCE, or a --list of images")
    if args.list_column is not None and not args.list:
        raise UsageError("--list-column is the column of a --list, and none is given")
    if args.list.count("-") > 1:
        raise UsageError("--list - is standard input, which can be read only once")
    fit = fit_of(args)
    folder: Path = args.out
    progress = ProgressLine(sys.stderr, time.monotonic)
    left_out = ""
    try:
        images = sources.find_images(args.sources, args.list, list_column=args.list_column, image_keys=args.image_key)
        left_out = str(images.left_out)
        with connect(args) as client:
            model = get_model(client)
            options = ExtractionOptions(
                format=args.format,
                outputs=args.outputs,
                layers=layer_numbers(args.layers, model),
                preset=args.preset,
                size=args.size,
                interpolation=args.interpolation,
                exif=args.exif,
                fit=fit,
                background=args.background,
                allow_truncated=args.allow_truncated,
                dtype=args.dtype,
                pool=args.pool,
                projection=args.projection,
                shard_rows=args.shard_rows,
            )
            totals = extraction.extract(
                client,
                model,
                images,
                folder,
                options,
                in_flight=args.in_flight,
                batch_images=args.batch_size,
                priority=args.priority,
                progress=progress,
                shard=args.shard,
            )
    except SourceError as error:
        raise UsageError(str(error)) from None
    except (Dinov3Error, OSError) as error:
        code = report_error(error, folder, progress)
    else:
        code = report_totals(totals, args, progress)
    if left_out:
        print_error(f"left out: {left_out}")
    return code


def add_allow_failed_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-failed",
        type=_count,
        default=0,
        metavar="N",
        help="exit with 0, not 3, if at most N images have no features (default: %(default)s)",
    )


def report_error(error: Exception, folder: Path, progress: ProgressLine) -> int:
    """Report the error that ended a command which writes to `folder`, and return the exit code."""
    progress.end()
    print_error(describe(error))
    lasting = isinstance(error, _LASTING) and not isinstance(error, FolderInUse)
    if progress.total:
        _advise(folder, "would be refused again" if lasting else "resumes from there")
    return REFUSED if lasting else STOPPED


def report_totals(totals: manifest.Totals, args: argparse.Namespace, progress: ProgressLine) -> int:
    """Report what was written to `args.out`, and return the exit code."""
    progress.end()
    print_line(f"{totals.rows} of {totals.images} images written to {args.out} ({progress.summary()})")
    if totals.failed:
        print_error(f"{totals.failed} of {totals.images} images have no features: see {args.out / manifest.FAILED}")
    return IMAGES_FAILED if totals.failed > args.allow_failed else 0


def report_interrupt_and_advise(args: argparse.Namespace) -> None:
    report_interrupt(args)
    if (args.out / manifest.MANIFEST).exists():
        _advise(args.out, "resumes from there")


def _advise(folder: Path, outlook: str) -> None:
    print_error(f"stopped; {folder} keeps what was answered, and the same command {outlook}")


class ProgressLine:
    """Reports progress on stderr: on a terminal in one line that is rewritten, else a line every ten seconds."""

    def __init__(self, stream: TextIO, now: Callable[[], float]) -> None:
        self.total = 0
        self._stream = stream
        self._now = now
        self._live = stream.isatty()
        self._done = self._begun = self._failed = 0
        self._start = self._last = 0.0
        self._shown = ""

    def begin(self, done: int, total: int) -> None:
        self.total, self._done, self._begun = total, done, done
        self._start = self._last = self._now()
        if 0 < done < total:
            print_error(f"resuming after {done:,} of {total:,} images")

    def advance(self, images: int) -> None:
        self._done += images
        now = self._now()
        if now - self._last < (_LIVE_SECONDS if self._live else _LOGGED_SECONDS):
            return
        self._last = now
        self._write(self._text(now))

    def failed(self, image: str, reason: str) -> None:
        self._failed += 1
        if self._failed <= _SHOWN_FAILURES:
            self.end()
            print_error(f"{image}: {reason}")
        elif self._failed == _SHOWN_FAILURES + 1:
            self.end()
            print_error("more images have no features; they are not shown here")

    def summary(self) -> str:
        """Return the images that this run finished, its duration and its rate."""
        seconds = self._now() - self._start
        images = self._done - self._begun
        return f"this run: {images:,} images in {seconds:,.1f} s, {images / max(seconds, 1e-9):,.1f}/s"

    def end(self) -> None:
        """Clear the line for other output."""
        if self._shown:
            self._stream.write("\r" + " " * len(self._shown) + "\r")
            self._shown = ""

    def _text(self, now: float) -> str:
        rate = (self._done - self._begun) / max(now - self._start, 1e-9)
        left = f"{_duration((self.total - self._done) / rate)} left" if rate else ""
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self._done:,} of {self.total:,} ({self._done / self.total:.1%}), {rate:,.1f}/s, {left}{failed}"

    def _write(self, text: str) -> None:
        if self._live:
            self._stream.write("\r" + text.ljust(len(self._shown)))
            self._shown = text
            self._stream.flush()
        else:
            print_error(text)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N: 1/4, 2/4, 3/4 and 4/4 are all of 4")
    return int(number), int(count)


def _image_keys(text: str) -> tuple[str, ...]:
    try:
        return parse_image_keys(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _outputs(text: str) -> tuple[TokenKind, ...]:
    kinds = [kind for kind in get_args(TokenKind) if kind in text.split(",")]
    unknown = [name for name in text.split(",") if name not in kinds]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not an output; allowed are cls, patches and registers")
    return tuple(kinds)
