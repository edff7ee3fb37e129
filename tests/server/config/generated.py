"""Generate the parts of docs/ and deploy/ that list settings and metrics.

`PYTHONPATH=server python -m tests.server.config.generated` writes the files; a test fails while they differ.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from dinov3_server.config.settings import SETTINGS, TOPICS, Setting
from dinov3_server.metrics import SPECS
from tests.support.paths import ROOT


def settings_tables() -> str:
    lines: list[str] = []
    for topic in TOPICS:
        lines += [f"\n### {topic.capitalize()}\n", "| setting | default | allowed | |", "|---|---|---|---|"]
        lines += [
            f"| `{each.name}` | {_code(each.show(each.default))} | {each.type.allowed} | {each.help} |"
            for each in SETTINGS
            if each.topic == topic
        ]
    return "\n".join(lines) + "\n\n"


def metrics_table() -> str:
    lines = ["| metric | type | labels | |", "|---|---|---|---|"]
    lines += [f"| `{spec.name}` | {spec.kind} | {', '.join(map(_code, spec.labels))} | {spec.help} |" for spec in SPECS]
    return "\n" + "\n".join(lines) + "\n\n"


def example_config() -> str:
    lines = [
        "# Settings of dinov3-server, each with its default. Use: dinov3-server serve --config config.yaml",
        "# Take the # away from what you change. A flag or a DINOV3_ environment variable wins over this file.",
    ]
    for topic in TOPICS:
        lines.append(f"\n# --- {topic} ---")
        for each in SETTINGS:
            if each.topic == topic:
                lines += ["", *textwrap.wrap(each.help, 98, initial_indent="# ", subsequent_indent="# ")]
                lines.append(f"#{each.name}: {_example(each)}")
    return "\n".join(lines) + "\n"


def between_markers(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between its lines `<!-- NAME: begin... -->` and `<!-- NAME: end -->`."""
    begin = text.index("-->\n", text.index(f"<!-- {name}: begin")) + len("-->\n")
    end = text.index(f"<!-- {name}: end -->")
    return text[:begin] + body + text[end:]


def generated() -> dict[Path, str]:
    """Return the content that each file should have."""
    configuration, metrics = ROOT / "docs/configuration.md", ROOT / "docs/metrics.md"
    return {
        configuration: between_markers(configuration.read_text(), "settings", settings_tables()),
        metrics: between_markers(metrics.read_text(), "metrics", metrics_table()),
        ROOT / "deploy/config.yaml": example_config(),
    }


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _example(setting: Setting) -> str:
    return setting.show(setting.default) or setting.type.metavar


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
