"""Settings from flags, environment, YAML and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinov3_server.config.load import load, nearest
from dinov3_server.config.settings import SETTINGS, Settings
from dinov3_server.errors import ConfigError

# For each setting, a text that differs from its default, and its value. "FILE" stands for a file that exists.
EXAMPLES: dict[str, tuple[str, Any]] = {
    "host": ("::1", "::1"),
    "port": ("6000", 6000),
    "http_host": ("localhost", "localhost"),
    "http_port": ("0", 0),
    "max_connection_age_seconds": ("600", 600.0),
    "model": ("vitb16", "vitb16"),
    "weights": ("random:7", "random:7"),
    "dataset": ("sat493m", "sat493m"),
    "backbone": ("reference", "reference"),
    "dtype": ("bfloat16", "bfloat16"),
    "devices": ("cpu,cuda:0,cuda:11", ("cpu", "cuda:0", "cuda:11")),
    "warm_up_sizes": ("384x512,16x16", ((384, 512), (16, 16))),
    "projections": ("p64=FILE,P_2-b=FILE", (("p64", "FILE"), ("P_2-b", "FILE"))),
    "cache_dir": ("/srv/dinov3", "/srv/dinov3"),
    "offline": ("yes", True),
    "weights_url": ("https://example.org/w.pth", "https://example.org/w.pth"),
    "verify_weights": ("full", "full"),
    "upstream_repo": ("https://example.org/dinov3.git", "https://example.org/dinov3.git"),
    "upstream_revision": ("0123456789ABCDEF0123456789abcdef01234567", "0123456789abcdef0123456789abcdef01234567"),
    "upstream_dir": ("/srv/code", "/srv/code"),
    "parity_check": ("off", False),
    "max_batch_images": ("8", 8),
    "max_batch_tokens": ("1_000", 1000),
    "max_queue_delay_seconds": ("0.005", 0.005),
    "max_queue_images": ("700", 700),
    "max_wait_seconds": ("12.5", 12.5),
    "max_images_per_request": ("64", 64),
    "max_message_bytes": ("64MB", 64_000_000),
    "max_image_pixels": ("1000000", 1_000_000),
    "arena_bytes": ("1GiB", 2**30),
    "frontend_bytes": ("2GiB", 2**31),
    "stream_window": ("1", 1),
    "frontends": ("3", 3),
    "decode_threads": ("2", 2),
    "threads": ("4", 4),
    "drain_seconds": ("2.5", 2.5),
    "batch_timeout_seconds": ("1e1", 10.0),
    "worker_restart_limit": ("1", 1),
    "token_file": ("FILE", "FILE"),
    "tls_cert_file": ("FILE", "FILE"),
    "tls_key_file": ("FILE", "FILE"),
    "tls_client_ca_file": ("FILE", "FILE"),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "access_log": ("access.jsonl", "access.jsonl"),
}


def named(value: Any, existing: str) -> Any:
    """Return a value of EXAMPLES with the path of an existing file."""
    if isinstance(value, tuple):
        return tuple(named(part, existing) for part in value)
    return existing if value == "FILE" else value


def yaml_file(folder: Path, text: str) -> dict[str, str]:
    """Write a YAML file and return the flags that name it."""
    path = folder / "config.yaml"
    path.write_text(text)
    return {"config": str(path)}


def test_examples_are_complete_and_differ_from_the_defaults() -> None:
    assert list(EXAMPLES) == [setting.name for setting in SETTINGS]
    assert [name for name, (_, value) in EXAMPLES.items() if value == getattr(Settings(), name)] == []


@pytest.mark.parametrize("source", ["flag", "environment", "yaml"])
def test_every_setting_from_every_source(source: str, existing: str, tmp_path: Path) -> None:
    texts = {name: text.replace("FILE", existing) for name, (text, _) in EXAMPLES.items()}
    if source == "flag":
        settings, sources = load(texts, {})
    elif source == "environment":
        settings, sources = load({}, {f"DINOV3_{name.upper()}": text for name, text in texts.items()})
    else:
        lines = "".join(f"{name}: {text}\n" for name, text in texts.items())
        settings, sources = load(yaml_file(tmp_path, lines), {})
    for line, (name, (_, value)) in enumerate(EXAMPLES.items(), start=1):
        assert getattr(settings, name) == named(value, existing)
        assert (
            sources[name]
            == {
                "flag": f"flag --{name.replace('_', '-')}",
                "environment": f"environment DINOV3_{name.upper()}",
                "yaml": f"{tmp_path}/config.yaml:{line}",
            }[source]
        )


def test_precedence(tmp_path: Path) -> None:
    flags = yaml_file(tmp_path, "max_batch_images: 1\nmax_queue_images: 1000\nstream_window: 3\n")
    environ = {"DINOV3_MAX_BATCH_IMAGES": "2", "DINOV3_MAX_QUEUE_IMAGES": "2000"}
    settings, sources = load({**flags, "max_batch_images": "3"}, environ)
    assert (settings.max_batch_images, settings.max_queue_images, settings.stream_window) == (3, 2000, 3)
    assert settings.max_batch_tokens == 16384
    assert [
        sources[name] for name in ("max_batch_images", "max_queue_images", "stream_window", "max_batch_tokens")
    ] == [
        "flag --max-batch-images",
        "environment DINOV3_MAX_QUEUE_IMAGES",
        f"{flags['config']}:3",
        "default",
    ]


def test_config_flag_wins_over_its_variable(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("port: 1\n")
    assert load({}, {"DINOV3_CONFIG": str(other)})[0].port == 1
    assert load(yaml_file(tmp_path, "port: 2"), {"DINOV3_CONFIG": str(other)})[0].port == 2


def test_defaults_apply_without_any_source() -> None:
    settings, sources = load({}, {"HOME": "/root", "DINOV3": "no prefix", "dinov3_port": "lower case"})
    assert settings == Settings()
    assert set(sources.values()) == {"default"}
    assert list(sources) == [setting.name for setting in SETTINGS]


def test_setting_types_show_values_as_they_parse_them(existing: str) -> None:
    for setting in SETTINGS:
        setting_type = setting.type
        value = setting_type.parse(EXAMPLES[setting.name][0].replace("FILE", existing))
        assert setting_type.parse(setting_type.show(value)) == value
        if setting.default not in (None, ""):
            assert setting_type.parse(setting.show(setting.default)) == setting.default


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("arena_bytes", "1048576", 2**20),
        ("arena_bytes", "2048KiB", 2**21),
        ("arena_bytes", "512 MiB", 2**29),
        ("arena_bytes", "2GB", 2 * 10**9),
        ("arena_bytes", "5000KB", 5_000_000),
        ("warm_up_sizes", "none", ()),
        ("warm_up_sizes", "224x224, 256x256", ((224, 224), (256, 256))),
        ("devices", "cpu,cpu", ("cpu", "cpu")),
        ("devices", "cuda:1 , cuda:0", ("cuda:1", "cuda:0")),
        ("offline", "1", True),
        ("offline", "False", False),
        ("projections", "none", ()),
        ("port", "65535", 65535),
        ("max_queue_delay_seconds", "10", 10.0),
    ],
)
def test_values_that_are_allowed(name: str, text: str, value: object) -> None:
    assert getattr(load({name: text}, {})[0], name) == value


BAD_VALUES = [
    ("port", "65536"),
    ("port", "-1"),
    ("port", "http"),
    ("port", "80.5"),
    ("port", ""),
    ("host", ""),
    ("weights", ""),
    ("dtype", "float16"),
    ("log_level", "INFO"),
    ("log_format", "xml"),
    ("max_batch_images", "0"),
    ("max_queue_delay_seconds", "-0.1"),
    ("max_queue_delay_seconds", "nan"),
    ("drain_seconds", "inf"),
    ("drain_seconds", "30s"),
    ("arena_bytes", "512 mb"),
    ("arena_bytes", "1.5GiB"),
    ("arena_bytes", "-1"),
    ("arena_bytes", "1000"),
    ("max_message_bytes", "2GiB"),
    ("devices", ""),
    ("devices", "gpu"),
    ("devices", "cuda"),
    ("devices", "cuda:01"),
    ("devices", "cuda:0,cuda:0"),
    ("devices", "auto,cpu"),
    ("devices", "cpu,"),
    ("warm_up_sizes", "224"),
    ("warm_up_sizes", "0x16"),
    ("warm_up_sizes", "518x518"),
    ("warm_up_sizes", "224x225"),
    ("warm_up_sizes", "225x224"),
    ("warm_up_sizes", "224x224,"),
    ("projections", "p64"),
    ("projections", "p64="),
    ("projections", "p64=/does/not/exist.npy"),
    ("projections", "p64=/dev/null"),
    ("projections", "p 64=FILE"),
    ("projections", "=FILE"),
    ("projections", "p64=FILE,"),
    ("projections", "p64=FILE,p64=FILE"),
    ("token_file", "/does/not/exist"),
    ("token_file", "/"),
    ("token_file", "/dev/null"),
    ("tls_cert_file", ""),
]


@pytest.mark.parametrize(("name", "text"), BAD_VALUES)
def test_bad_value_names_setting_source_value_and_what_is_allowed(name: str, text: str, existing: str) -> None:
    text = text.replace("FILE", existing)
    allowed = next(setting.type.allowed for setting in SETTINGS if setting.name == name)
    given: list[tuple[dict[str, str], dict[str, str], str]] = [({name: text}, {}, f"flag --{name.replace('_', '-')}")]
    if text or name == "tls_cert_file":  # an empty variable counts as unset, but for tokens and TLS
        given.append(({}, {f"DINOV3_{name.upper()}": text}, f"environment DINOV3_{name.upper()}"))
    for flags, environ, source in given:
        with pytest.raises(ConfigError) as caught:
            load(flags, environ)
        assert str(caught.value) == f"{name} is {text!r} ({source}); allowed: {allowed}"


def test_a_bad_value_is_an_error_even_if_another_overrides_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="port is 'http'"):
        load({**yaml_file(tmp_path, "port: http"), "port": "1"}, {})
    with pytest.raises(ConfigError, match="port is 'x'"):
        load({"port": "1"}, {"DINOV3_PORT": "x"})


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("DINOV3_PRT", "; did you mean DINOV3_PORT?"),
        ("DINOV3_MAX_BATCH_IMAGE", "; did you mean DINOV3_MAX_BATCH_IMAGES?"),
        ("DINOV3_", " ("),
    ],
)
def test_unknown_variable(variable: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, {variable: "1"})
    assert str(caught.value).startswith(f"environment {variable} is not a setting{hint}")


def test_an_empty_variable_counts_as_unset() -> None:
    """As `PORT: ${PORT:-}` of a compose file makes it."""
    settings, sources = load({}, {"DINOV3_PORT": "", "DINOV3_DEVICES": "", "DINOV3_WEIGHTS": ""})
    assert settings == Settings()
    assert sources["port"] == "default"
    with pytest.raises(ConfigError, match="DINOV3_PROT is not a setting"):
        load({}, {"DINOV3_PROT": ""})


@pytest.mark.parametrize("name", ["token_file", "tls_cert_file", "tls_key_file", "tls_client_ca_file"])
def test_an_empty_name_of_a_secret_does_not_open_the_server(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is '' \(environment DINOV3_{name.upper()}\)"):
        load({}, {f"DINOV3_{name.upper()}": ""})


def test_variables_that_are_not_settings() -> None:
    names = ("DINOV3_TARGET", "DINOV3_TOKEN", "DINOV3_UPSTREAM")
    others = dict.fromkeys(names, "x")
    # For Services called "dinov3", "dinov3-server" and "dinov3-http", as Kubernetes writes them.
    links = {
        "DINOV3_SERVICE_HOST": "10.0.0.1",
        "DINOV3_SERVICE_PORT": "50051",
        "DINOV3_SERVICE_PORT_GRPC": "50051",
        "DINOV3_PORT": "tcp://10.0.0.1:50051",
        "DINOV3_PORT_50051_TCP": "tcp://10.0.0.1:50051",
        "DINOV3_PORT_50051_TCP_PROTO": "tcp",
        "DINOV3_PORT_50051_TCP_ADDR": "10.0.0.1",
        "DINOV3_SERVER_SERVICE_HOST": "10.0.0.1",
        "DINOV3_SERVER_PORT_8080_TCP_PORT": "8080",
        "DINOV3_HTTP_PORT": "tcp://10.0.0.2:8080",
    }
    assert load({}, others | links) == load({}, {})
    with pytest.raises(ConfigError, match="DINOV3_SUPPORT is not a setting"):
        load({}, {"DINOV3_SUPPORT": "https://example.org"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb: c", "is not valid YAML"),
        ("port: 1\n---\nport: 2", "is not valid YAML"),
        ("port: [1", "is not valid YAML"),
        ("- port", "must be a mapping of settings"),
        ("port", "must be a mapping of settings"),
        ("port: 1\nmax-batch-images: 3", ":2: max-batch-images is not a setting; did you mean max_batch_images?"),
        ("Port: 1", ":1: Port is not a setting; did you mean port?"),
        ("zzz: 1", ":1: zzz is not a setting (`dinov3-server config` lists them)"),
        ("? [a, b]\n: 1", ":1: a list or mapping as a key is not a setting"),
        ("port: 1\nhost: x\nport: 1", ":3: port is given twice, first at "),
        ("port:", ":1: port has no value"),
        ("token_file: null", ":1: token_file has no value"),
        ("devices: [cpu, ~]", ":1: devices has no value"),
        ("port: [1]", ":1: port holds a list; allowed: an integer from 0 to 65535"),
        ("port: {a: 1}", ":1: port holds a mapping"),
        ("devices: [[cpu]]", ":1: devices holds a list"),
        ("port: !!python/object/apply:os.getpid []", ":1: port holds a list"),
        ("host: !!python/name:os.system x", ":1: host has the YAML tag tag:yaml.org,2002:python/name:os.system"),
        ("port: true", "port is 'true' ("),
        ("\nport: 0x10", "config.yaml:2); allowed: an integer"),
        ("devices: []", "devices is '' ("),
    ],
)
def test_bad_yaml(text: str, message: str, tmp_path: Path) -> None:
    flags = yaml_file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(flags, {})
    assert message in str(caught.value)
    assert flags["config"] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "# port: 1\n", "---\n", "{}"])
def test_empty_yaml_sets_nothing(text: str, tmp_path: Path) -> None:
    assert load(yaml_file(tmp_path, text), {})[0] == Settings()


def test_yaml_lists(tmp_path: Path) -> None:
    flags = yaml_file(tmp_path, "devices: [cuda:0, cuda:1]\nwarm_up_sizes:\n  - 224x224\n  - 384x512\n")
    settings, _ = load(flags, {})
    assert settings.devices == ("cuda:0", "cuda:1")
    assert settings.warm_up_sizes == ((224, 224), (384, 512))
    assert load(yaml_file(tmp_path, "warm_up_sizes: []"), {})[0].warm_up_sizes == ()


def test_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="No such file") as caught:
        load({"config": missing}, {})
    assert f"{missing!r} (flag --config)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"'' \(environment DINOV3_CONFIG\)"):
        load({}, {"DINOV3_CONFIG": ""})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"host: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load({"config": str(binary)}, {})


def test_nearest() -> None:
    assert nearest("--prot", ["--port", "--host"]) == "; did you mean --port?"
    assert nearest("--frobnicate", ["--port", "--host"]) == ""
    assert nearest("PREFIX_ABC", ["PREFIX_XYZ"]) != ""
    assert nearest("PREFIX_ABC", ["PREFIX_XYZ"], "PREFIX_") == ""
