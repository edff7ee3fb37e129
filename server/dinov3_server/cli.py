"""The command `dinov3-server`: `serve`, `config` and `models`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from dinov3_server import __version__, config, log
from dinov3_server.backbone import registry
from dinov3_server.backbone.registry import VitVariant
from dinov3_server.config import Settings
from dinov3_server.errors import ConfigError, StartupError

RUNNER = "dinov3_server.backbone.runner:build"


def main(argv: Sequence[str] | None = None, runner: str = RUNNER) -> int:
    """Run the command and return its exit code: that of the StartupError (see errors.py) where it could not start.

    `runner` names what builds the model on a device ("module:function"); tests serve another one.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    command = arguments.pop("command")
    try:
        if command == "models":
            sys.stdout.write(_models())
            return 0
        settings, sources = config.load(arguments, os.environ)
        variant = registry.lookup(settings.model)
        _check_sizes(settings, variant)
        if command == "config":
            sys.stdout.write(_effective(settings, sources))
            return 0
        return _serve(settings, variant, runner)
    except StartupError as error:
        sys.stderr.write(f"dinov3-server: {error}\n")
        return error.exit_code


def _check_sizes(settings: Settings, variant: VitVariant) -> None:
    """What settings say of image sizes must suit the model. Raises ConfigError."""
    for height, width in settings.warm_up_sizes:
        rows, odd_height = divmod(height, variant.patch_size)
        columns, odd_width = divmod(width, variant.patch_size)
        tokens = 1 + variant.registers + rows * columns
        if odd_height or odd_width:
            raise ConfigError(
                f"warm_up_sizes has {height}x{width}; {variant.name} takes multiples of {variant.patch_size} only"
            )
        if tokens > settings.max_batch_tokens:
            raise ConfigError(
                f"warm_up_sizes has {height}x{width}, which is {tokens} tokens; max_batch_tokens allows an image of "
                f"{settings.max_batch_tokens}"
            )


def _serve(settings: Settings, variant: VitVariant, runner: str) -> int:
    from dinov3_server import supervisor  # Imported here, so that `config` and `models` start fast.

    log.configure(settings.log_level, settings.log_format, "supervisor")
    return supervisor.run(settings, runner)


def _effective(settings: Settings, sources: Mapping[str, str]) -> str:
    rows = [
        (declared.name, declared.show(getattr(settings, declared.name)) or "(unset)", sources[declared.name])
        for declared in config.SETTINGS
    ]
    return _table(("SETTING", "VALUE", "SOURCE"), rows)


def _models() -> str:
    rows = [
        (
            variant.name,
            f"{variant.parameters:,}",
            str(variant.embed_dim),
            str(variant.depth),
            str(variant.heads),
            f"{variant.ffn} {variant.ffn_dim}",
            str(variant.patch_size),
            str(variant.registers),
            ", ".join(variant.hashes),
        )
        for variant in registry.VARIANTS.values()
    ]
    head = ("MODEL", "PARAMETERS", "DIM", "DEPTH", "HEADS", "FFN", "PATCH", "REGISTERS", "OFFICIAL WEIGHTS")
    aliases = ", ".join(f"{alias} = {name}" for alias, name in registry.ALIASES.items())
    return f"{_table(head, rows)}\nThe prefix dinov3_ may be left out. Aliases: {aliases}.\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


# --- the command line --------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line: the usage, which names every flag, would bury it.
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _parse(argv: Sequence[str]) -> dict[str, str]:
    """`command`, and the text of each flag that was given; exits with 2 where they make no sense."""
    parser, flags = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        what = unknown[0].partition("=")[0]
        near = config.nearest(what, flags if arguments.command != "models" else (), "--")
        parser.exit(
            2, f"{parser.prog}: unknown argument {what}{near} (see `{parser.prog} {arguments.command} --help`)\n"
        )
    return {name: text for name, text in vars(arguments).items() if text is not None}


def _parser() -> tuple[_Parser, list[str]]:
    shared = _Parser(add_help=False, allow_abbrev=False)
    shared.add_argument("--config", metavar="FILE", help=f"YAML file of settings; also {config.CONFIG_ENV}")
    groups = {topic: shared.add_argument_group(topic) for topic in config.TOPICS}
    for declared in config.SETTINGS:
        default = declared.show(declared.default)
        text = declared.help + (f" Default: {default}." if default else "")
        groups[declared.topic].add_argument(declared.flag, metavar=declared.kind.metavar, help=text.replace("%", "%%"))

    parser = _Parser(prog="dinov3-server", description="A gRPC feature server for DINOv3.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dinov3-serving {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    about = (
        "Every flag --some-name is also the environment variable DINOV3_SOME_NAME and the key some_name of the YAML "
        "file. A flag wins over the environment, the environment over the file."
    )
    for name, help in (
        ("serve", "serve a model until SIGTERM"),
        ("config", "show the effective settings and where each comes from, and exit"),
    ):
        commands.add_parser(
            name,
            help=help,
            usage=f"dinov3-server {name} [FLAGS]",
            description=f"{help[0].upper()}{help[1:]}. {about}",
            parents=[shared],
            allow_abbrev=False,
        )
    commands.add_parser("models", help="list the models that can be served", allow_abbrev=False)
    return parser, ["--config", *(declared.flag for declared in config.SETTINGS)]


if __name__ == "__main__":
    sys.exit(main())
