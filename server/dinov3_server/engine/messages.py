"""What processes say to each other. F frontend, W worker, S supervisor, P provisioner.

Every row that a frontend submits is answered by exactly one of `Results` and `Dropped`, or by the
supervisor's `WorkerGone`. Until then the worker may touch the row's ranges of the arena. What is said for every request
is named tuples: pickle takes twice as long for a dataclass with slots.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dinov3_server.config.settings import Settings
from dinov3_server.engine.block import Block, unpickled
from dinov3_server.engine.pace import BatchTime
from dinov3_server.engine.shares import ANONYMOUS, Caller
from dinov3_server.errors import StartupError
from dinov3_server.models.interface import ModelInfo, PixelShape, Provisioned

SNAPSHOT_SECONDS = 1.0


@dataclass(frozen=True)
class StartProvisioner:
    """S -> P, on standard input: what to find or fetch."""

    settings: Settings
    index: int = 0


@dataclass(frozen=True)
class StartWorker:
    """S -> W, on standard input: what to load and where. `runner` is "module:function"."""

    settings: Settings
    index: int
    device: str
    runner: str
    provisioned: Provisioned


@dataclass(frozen=True)
class StartFrontend:
    """S -> F, on standard input: where to listen."""

    settings: Settings
    index: int
    frontends: int
    host: str
    port: int


@dataclass(frozen=True)
class Connected:
    """S -> F and S -> W, with the descriptor of a channel to the other side's process `index`."""

    index: int


@dataclass(frozen=True)
class WorkerGone:
    """S -> F: worker `index` is reaped, nothing of it touches memory any more; another is expected.

    Also of a worker that never became ready: then only the expectation is news.
    """

    index: int
    restart_seconds: float  # seconds until its successor is expected to serve
    killed: bool = False  # by SIGKILL, which may have come from outside: an operator, or the kernel for want of memory


@dataclass(frozen=True)
class Drain:
    """S -> F: finish what is accepted within `grace` seconds, then exit. S -> W: exit."""

    grace: float


@dataclass(frozen=True)
class Reload:
    """S -> F: read the files of tokens and TLS again now."""


@dataclass(frozen=True)
class Ready:
    """W -> S: the model is loaded and warm. F -> S: it listens, and knows a worker."""

    info: ModelInfo | None = None


@dataclass(frozen=True)
class StartFailed:
    """F -> S, W -> S and P -> S: the process cannot start for a reason that a person must mend."""

    error: StartupError


@dataclass(frozen=True)
class ExitReason:
    """F -> S and W -> S: why the process is about to end, one line."""

    reason: str

    @classmethod
    def of(cls, error: BaseException) -> ExitReason:
        first_line = str(error).partition("\n")[0]
        return cls(f"{type(error).__name__}: {first_line}"[:300])


@dataclass(frozen=True)
class Reached:
    """W -> S, each step once: a frontend is attached; the first batch is about to reach the device.

    It tells a process that cannot work from one that was given something to die of.
    """

    step: Literal["attached", "batch"]


@dataclass(frozen=True)
class NotConnected:
    """F -> S: the channel to worker `index` could not be taken, for want of descriptors; to be tried again."""

    index: int


@dataclass(frozen=True)
class Progress:
    """P -> S: what it is at, for /readyz."""

    text: str


@dataclass(frozen=True)
class Prepared:
    """P -> S, its last message: everything is there. `seconds` is by step, for dinov3_model_load_seconds."""

    provisioned: Provisioned
    seconds: dict[str, float]


@dataclass(frozen=True)
class MetricsSnapshot:
    """F -> S and W -> S, every SNAPSHOT_SECONDS; it also tells that the process is not stuck."""

    snapshot: Any


@dataclass(frozen=True)
class Hello:
    """W -> F, the first message: the model. The frontend's arena is attached, so it may submit."""

    info: ModelInfo


@dataclass(frozen=True)
class Attach:
    """F -> W, the first message, with the descriptor of the frontend's arena."""

    nbytes: int


class Submit(NamedTuple):
    """F -> W: compute `rows` of `block`. Times are CLOCK_MONOTONIC seconds, the same in all processes."""

    part: int
    block: Block
    rows: tuple[int, ...]
    enqueued: float
    deadline: float | None
    bulk: bool
    solo: bool  # every row in a batch of its own: it is suspected of having killed a worker
    caller: Caller = ANONYMOUS


class Cancel(NamedTuple):
    """F -> W: nobody waits for this part any more."""

    part: int


class PartRows(NamedTuple):
    part: int
    rows: tuple[int, ...]


class Started(NamedTuple):
    """W -> F: these rows are about to reach the device. Sent before they do, so that a crash can be laid to them."""

    parts: tuple[PartRows, ...]


class PartResult(NamedTuple):
    """What one batch did for one part. `failed` maps rows that have no features to the reason."""

    part: int
    rows: tuple[int, ...]
    failed: dict[int, str]
    queue_seconds: float  # longest wait of one of the rows
    inference_seconds: float
    batch_images: int


class Load(NamedTuple):
    """Tokens that a worker has of other frontends: on the device, and waiting by class."""

    running: int = 0
    interactive: int = 0
    bulk: int = 0

    @property
    def tokens(self) -> int:
        return self.running + self.interactive + self.bulk


NO_LOAD = Load()


class Backlog(NamedTuple):
    """W -> F, now and then: what other frontends have here, and the last batch that the device ran."""

    others: Load
    batch: BatchTime | None


class Results(NamedTuple):
    """W -> F: features lie in the arena. `others` and `batch` as in `Backlog`."""

    parts: tuple[PartResult, ...]
    others: Load
    batch: BatchTime | None

    def __reduce__(self) -> tuple[Callable[..., Results], tuple[object, ...]]:
        """Take the message apart for pickle, which is quicker at plain tuples than at named ones."""
        batch = None if self.batch is None else tuple(self.batch)
        return unpickled_results, (tuple(map(tuple, self.parts)), tuple(self.others), batch)


class Dropped(NamedTuple):
    """W -> F: these rows never reached the device. "late": they could not have ended before their deadline."""

    part: int
    rows: tuple[int, ...]
    reason: Literal["cancelled", "expired", "late"]


def unpickled_results(
    parts: tuple[tuple[Any, ...], ...], others: tuple[int, ...], batch: tuple[Any, ...] | None
) -> Results:
    """Return the message that `Results.__reduce__` took apart."""
    return Results(
        tuple(PartResult(*part) for part in parts), Load(*others), None if batch is None else BatchTime(*batch)
    )


# What a request's messages are made of goes into pickles as one byte, not as the names of a module and a class: that
# halves the time. These codes are copyreg's for private use.
_PICKLED_BY_CODE: tuple[Any, ...] = (
    *(Submit, Cancel, PartRows, Started, PartResult, Load, Backlog, Results, Dropped),
    *(BatchTime, Caller, PixelShape, unpickled, unpickled_results),
)
for _code, _pickled in enumerate(_PICKLED_BY_CODE, 0xF0):
    copyreg.add_extension(_pickled.__module__, _pickled.__qualname__, _code)
