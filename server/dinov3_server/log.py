"""Log to stderr as readable text, or as one JSON object a line. Each process configures its own log."""

from __future__ import annotations

import json
import logging
import os
import time

_TEXT_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-8s {process}: %(message)s"


def configure(level: str, format: str, process: str) -> None:
    """Configure logging to stderr in this process; a second call replaces the first.

    `level` is "debug", "info", "warning" or "error", `format` "text" or "json", `process` a name such as "worker-0".
    Other libraries log from "warning" on, since their debug lines are not about this service. Python's warnings become
    log lines.
    """
    handler = _StderrHandler()
    if format == "json":
        handler.setFormatter(_JsonFormatter(process))
    else:
        escaped = process.replace("%", "%%")
        handler.setFormatter(logging.Formatter(_TEXT_FORMAT.format(process=escaped), datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("dinov3_server").setLevel(level.upper())
    logging.captureWarnings(True)


class _StderrHandler(logging.Handler):
    """Write each record with one system call, so that lines of several processes on one stderr do not mix."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            while data:
                data = data[os.write(2, data) :]
        except Exception:
            self.handleError(record)


class _JsonFormatter(logging.Formatter):
    """Format a record as JSON: `ts` (UTC, ISO 8601), `level`, `process`, `logger`, `message`, and if present `exc` and
    `stack`."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "ts": f"{second}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exc"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, ensure_ascii=False)
