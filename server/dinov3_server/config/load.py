"""Load the settings from flags, the environment and a YAML file, and record the source of each value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dinov3_server.config.settings import BY_NAME, ENV_PREFIX, SETTINGS, Setting, Settings
from dinov3_server.errors import ConfigError

CONFIG_ENV = "DINOV3_CONFIG"
# Variables with this prefix that are not settings: the one that names the YAML file, and those of other commands.
_OTHER_ENV = frozenset({CONFIG_ENV, "DINOV3_TARGET", "DINOV3_TOKEN", "DINOV3_UPSTREAM"})
# Variables that Kubernetes sets in every pod if there is a Service called "dinov3" or "dinov3-...".
_SERVICE_LINK = re.compile(r"DINOV3_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")

_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "timestamp"))
_NULL = "tag:yaml.org,2002:null"
_LISTED = "`dinov3-server config` lists them"


class _Given(NamedTuple):
    value: Any
    source: str


def load(flags: Mapping[str, str], environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """Return the effective settings and the source of each. Overridden values are checked, too.

    `flags` holds the text of the given flags by setting name, and that of `--config` under `config`. A source is
    "flag --port", "environment DINOV3_PORT", "config.yaml:7" or "default".

    Raises:
        ConfigError: a name or a value is not allowed, settings contradict each other, or the file cannot be read.
    """
    given: dict[str, _Given] = {}
    if "config" in flags:
        given |= _read_yaml(flags["config"], "flag --config")
    elif CONFIG_ENV in environ:
        given |= _read_yaml(environ[CONFIG_ENV], f"environment {CONFIG_ENV}")
    given |= _read_environment(environ)
    given |= {
        name: _parse(BY_NAME[name], text, f"flag {BY_NAME[name].flag}")
        for name, text in flags.items()
        if name != "config"
    }
    settings = Settings(**{name: each.value for name, each in given.items()})
    return settings, {name: given[name].source if name in given else "default" for name in BY_NAME}


def nearest(unknown: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean X?" for a message about an unknown name, or "" if no known name is similar.

    `prefix` is the common beginning of all names, which does not count as similar.
    """
    bare = [name.removeprefix(prefix) for name in known]
    close = difflib.get_close_matches(unknown.removeprefix(prefix), bare, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _parse(setting: Setting, text: str, source: str) -> _Given:
    try:
        return _Given(setting.type.parse(text), source)
    except ValueError:
        raise ConfigError(f"{setting.name} is {text!r} ({source}); allowed: {setting.type.allowed}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    by_env = {setting.env: setting for setting in SETTINGS}
    given = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_ENV or _is_service_link(variable, text):
            continue
        # As `X=${X:-}` of a compose file. But an empty name of a token or certificate must not open the server.
        if variable in by_env and not text and by_env[variable].topic != "security":
            continue
        if variable not in by_env:
            near = nearest(variable, by_env, ENV_PREFIX)
            raise ConfigError(f"environment {variable} is not a setting{near} ({_LISTED})")
        given[by_env[variable].name] = _parse(by_env[variable], text, f"environment {variable}")
    return given


def _is_service_link(variable: str, text: str) -> bool:
    # DINOV3_PORT is a setting; as a service link it is "tcp://10.0.0.1:50051".
    return bool(_SERVICE_LINK.fullmatch(variable)) or (variable.endswith("_PORT") and "://" in text)


def _read_yaml(path: str, source: str) -> dict[str, _Given]:
    try:
        # compose, not load: nodes keep the text of their scalars and their line
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path!r} ({source}): {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} ({source}) is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} ({source}) is not valid YAML: {' '.join(str(error).split())}") from None
    if root is None or root.tag == _NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} ({source}) must be a mapping of settings, as `port: 50051`")

    given: dict[str, _Given] = {}
    for key, value in root.value:
        line = f"{path}:{key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping as a key"
        if name not in BY_NAME:
            raise ConfigError(f"{line}: {name} is not a setting{nearest(name, BY_NAME)} ({_LISTED})")
        if name in given:
            raise ConfigError(f"{line}: {name} is given twice, first at {given[name].source}")
        given[name] = _parse(BY_NAME[name], _yaml_text(value, BY_NAME[name], line), line)
    return given


def _yaml_text(node: yaml.Node, setting: Setting, line: str) -> str:
    if isinstance(node, yaml.SequenceNode) and setting.type.is_list:
        return ",".join(_yaml_scalar(item, setting, line) for item in node.value)
    return _yaml_scalar(node, setting, line)


def _yaml_scalar(node: yaml.Node, setting: Setting, line: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        raise ConfigError(f"{line}: {setting.name} holds {found}; allowed: {setting.type.allowed}")
    if node.tag == _NULL:
        raise ConfigError(f"{line}: {setting.name} has no value; leave the key out to take the default")
    if node.tag not in _SCALAR_TAGS:
        raise ConfigError(f"{line}: {setting.name} has the YAML tag {node.tag}; a plain value is allowed")
    return str(node.value)
