"""The command `dinov3-server`: `serve`, its preparations as commands of their own (`prepare`, `vendor`, `weights`),
`config` and `models`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from dinov3_server import __version__, log
from dinov3_server.config import load as config_load
from dinov3_server.config import settings as config
from dinov3_server.config.settings import Setting, Settings
from dinov3_server.config.types import BOOLEAN
from dinov3_server.errors import ConfigError, StartupError
from dinov3_server.families import registry
from dinov3_server.models.variant import Variant
from dinov3_server.signals import unwinding

RUNNER = "dinov3_server.backbone.runner:build"
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None, runner: str = RUNNER) -> int:
    """Run the command and return its exit code, after a StartupError that of the error (see errors.py).

    `runner` is the "module:function" that builds the model on a device; tests serve another one.
    """
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    command = arguments.pop("command")
    try:
        with unwinding():
            return _run(command, arguments, runner)
    except StartupError as error:
        sys.stderr.write(f"dinov3-server: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("dinov3-server: interrupted; the same command goes on where this one stopped\n")
        return INTERRUPTED


def _run(command: str, arguments: dict[str, str], runner: str) -> int:
    if command == "models":
        sys.stdout.write(_models())
        return 0
    force = arguments.pop("force", None) is not None
    settings, sources = config_load.load(arguments, os.environ)
    match command:
        case "vendor":
            _vendor(settings, force)
        case "weights":
            _weights(settings)
        case "prepare":
            registry.lookup(settings.model)
            _prepare(settings)
        case _:
            _check_sizes(settings, registry.lookup(settings.model))
            if command == "serve":
                _check_token(settings, os.environ)
                return _serve(settings, runner)
            sys.stdout.write(_effective(settings, sources))
    return 0


def _check_sizes(settings: Settings, variant: Variant) -> None:
    """Check that the settings' image sizes suit the model. Raises ConfigError."""
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


def _check_token(settings: Settings, environ: Mapping[str, str]) -> None:
    """Refuse to serve without tokens if the client's variable shows that one was meant. Raises ConfigError."""
    if environ.get("DINOV3_TOKEN") and settings.token_file is None:
        raise ConfigError(
            "DINOV3_TOKEN is a variable of the client; this server would accept every caller. Write the token to a "
            "file and name the file by --token-file or DINOV3_TOKEN_FILE, or unset DINOV3_TOKEN"
        )


def _serve(settings: Settings, runner: str) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the supervisor handles it; `unwinding` restores it
    from dinov3_server.processes.supervisor import Supervisor  # imported here, so that the other commands start fast

    log.configure(settings.log_level, settings.log_format, "supervisor")
    return Supervisor(settings, runner).run()


def _prepare(settings: Settings) -> None:
    """Do everything that `serve` would do before it loads the model."""
    from dinov3_server.provision.prepare import prepare

    log.configure(settings.log_level, settings.log_format, "prepare")
    found, _ = prepare(settings)
    sys.stdout.write(f"weights {found.weights}\ncode {found.checkout or f'(none: {found.unavailable_reason})'}\n")


def _vendor(settings: Settings, force: bool) -> None:
    from dinov3_server.provision.prepare import checkout_folder
    from dinov3_server.provision.vendor import vendor

    log.configure(settings.log_level, settings.log_format, "vendor")
    target = checkout_folder(settings)
    vendor(settings.upstream_repo, settings.upstream_revision, target, force=force, offline=settings.offline)
    sys.stdout.write(f"code {target}\n")


def _weights(settings: Settings) -> None:
    from dinov3_server.provision.hub import REPOSITORIES
    from dinov3_server.provision.prepare import is_random
    from dinov3_server.provision.weights import find_or_fetch

    log.configure(settings.log_level, settings.log_format, "weights")
    if is_random(settings.weights):
        raise ConfigError("random weights are made at start: there is nothing to fetch")
    if settings.model != "all":
        variants = [registry.lookup(settings.model)]
    elif settings.weights == "auto" and settings.weights_url is None:
        dataset = settings.dataset or "lvd1689m"
        variants = [registry.lookup(name) for name, of in REPOSITORIES if of == dataset]
    else:
        raise ConfigError("--model all fetches from Hugging Face: one --source or weights_url cannot hold every model")
    for variant in variants:
        found = find_or_fetch(replace(settings, model=variant.name), variant)
        sys.stdout.write(f"weights {found.path}\n")
        sys.stdout.flush()


def _effective(settings: Settings, sources: Mapping[str, str]) -> str:
    rows = [
        (setting.name, setting.show(getattr(settings, setting.name)) or "(unset)", sources[setting.name])
        for setting in config.SETTINGS
    ]
    return _table(("SETTING", "VALUE", "SOURCE"), rows)


def _models() -> str:
    rows = [
        (
            variant.name,
            f"{variant.parameters:,}",
            str(variant.embed_dim),
            str(variant.depth),
            str(variant.patch_size),
            str(variant.registers),
            variant.architecture,
            ", ".join(variant.hashes),
        )
        for variant in registry.VARIANTS.values()
    ]
    head = ("MODEL", "PARAMETERS", "DIM", "LAYERS", "PATCH", "REGISTERS", "ARCHITECTURE", "OFFICIAL WEIGHTS")
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
        # without the usage, which names every flag and would hide the message
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _parse(argv: Sequence[str]) -> dict[str, str]:
    """Return `command` and the text of each given flag. Exits with code 2 if they are not valid."""
    parser, flags = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        near = config_load.nearest(name, flags[arguments.command], "--")
        parser.exit(
            2, f"{parser.prog}: unknown argument {name}{near} (see `{parser.prog} {arguments.command} --help`)\n"
        )
    return {name: text for name, text in vars(arguments).items() if text is not None}


# The settings that a command takes, besides --config and those of logging.
_VENDOR = ("upstream_repo", "upstream_revision", "upstream_dir", "cache_dir", "offline")
_WEIGHTS = ("model", "weights", "dataset", "weights_url", "cache_dir", "offline", "verify_weights")


def _parser() -> tuple[_Parser, dict[str, list[str]]]:
    """Return the parser, and the flags of each command."""
    parser = _Parser(prog="dinov3-server", description="A gRPC feature server for DINOv3.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dinov3-serving {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    flags: dict[str, list[str]] = {"models": []}

    def add(name: str, help: str, only: Sequence[str] | None = None) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            usage=f"dinov3-server {name} [FLAGS]",
            description=f"{help[0].upper()}{help[1:]}. Every flag --some-name is also the environment variable "
            "DINOV3_SOME_NAME and the key some_name of the YAML file. A flag wins over the environment, the "
            "environment over the file.",
            allow_abbrev=False,
        )
        command.add_argument("--config", metavar="FILE", help=f"YAML file of settings; also {config_load.CONFIG_ENV}")
        settings = [each for each in config.SETTINGS if only is None or each.name in only or each.topic == "logging"]
        groups = {topic: command.add_argument_group(topic) for topic in dict.fromkeys(each.topic for each in settings)}
        for setting in settings:
            flag = "--source" if (name, setting.name) == ("weights", "weights") else setting.flag
            _add_flag(groups[setting.topic], flag, setting)
        flags[name] = [option for action in command._actions for option in action.option_strings]
        return command

    add("serve", "serve a model until SIGTERM; missing weights and code are fetched first")
    add("prepare", "fetch everything that `serve` with these settings would fetch, and exit")
    vendor = add("vendor", "fetch Meta's code, or check the existing checkout, and exit", _VENDOR)
    vendor.add_argument("--force", action="store_const", const="", help="fetch again if the checkout was modified")
    add("weights", "fetch the weights of --model (or of all), or check the existing files, and exit", _WEIGHTS)
    add("config", "show the effective settings and the source of each, and exit")
    commands.add_parser("models", help="list the models that can be served", allow_abbrev=False)
    flags["vendor"].append("--force")
    return parser, flags


def _add_flag(group: argparse._ArgumentGroup, flag: str, setting: Setting) -> None:
    default = setting.show(setting.default)
    help = (setting.help + (f" Default: {default}." if default else "")).replace("%", "%%")
    if setting.type is BOOLEAN:  # bare, it means true
        group.add_argument(flag, dest=setting.name, metavar=setting.type.metavar, help=help, nargs="?", const="true")
    else:
        group.add_argument(flag, dest=setting.name, metavar=setting.type.metavar, help=help)


if __name__ == "__main__":
    sys.exit(main())
