"""Define the control messages between processes: F frontend, W worker, S supervisor, P provisioner.

Every row that a frontend submits is answered exactly once: by `Results` or `Dropped`, or by the supervisor's
`WorkerGone`. Until then the worker may access the row's ranges of the arena. Messages that are sent for every request
are named tuples: pickle takes twice as long for a dataclass with slots.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
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
    """S -> P, on standard input: the settings that say what to find or fetch."""

    settings: Settings
    index: int = 0


@dataclass(frozen=True)
class StartWorker:
    """S -> W, on standard input: the model and the device. `runner` is the "module:function" that builds the runner."""

    settings: Settings
    index: int
    device: str
    runner: str
    provisioned: Provisioned


@dataclass(frozen=True)
class StartFrontend:
    """S -> F, on standard input: the address to listen on."""

    settings: Settings
    index: int
    frontends: int
    host: str
    port: int


@dataclass(frozen=True)
class Connected:
    """S -> F and S -> W, with the descriptor of a channel to the peer, which is worker or frontend `index`."""

    index: int


@dataclass(frozen=True)
class WorkerGone:
    """S -> F: worker `index` has been reaped, so it accesses no memory any more, and a successor is expected.

    Also sent for a worker that never became ready; then only `restart_seconds` is news.
    """

    index: int
    restart_seconds: float  # seconds until its successor is expected to serve
    killed: bool = False  # by SIGKILL, which may come from outside: an operator, or the kernel's OOM killer


@dataclass(frozen=True)
class Drain:
    """S -> F: finish the accepted calls within `grace` seconds, then exit. S -> W: exit."""

    grace: float


@dataclass(frozen=True)
class Reload:
    """S -> F: read the token and TLS files again now."""


@dataclass(frozen=True)
class Ready:
    """W -> S: the model is loaded and warmed up. F -> S: the frontend listens and is connected to a worker."""

    info: ModelInfo | None = None


@dataclass(frozen=True)
class StartFailed:
    """F -> S, W -> S and P -> S: the process cannot start for a reason that an operator must fix."""

    error: StartupError


@dataclass(frozen=True)
class ExitReason:
    """F -> S and W -> S: one line that says why the process is about to end."""

    reason: str

    @classmethod
    def of(cls, error: BaseException) -> ExitReason:
        first_line = str(error).partition("\n")[0]
        return cls(f"{type(error).__name__}: {first_line}"[:300])


@dataclass(frozen=True)
class Reached:
    """W -> S, once for each step: a frontend has been attached; the first batch is about to reach the device.

    A worker that dies before them cannot work at all; one that dies later may have died of its input.
    """

    step: Literal["attached", "batch"]


@dataclass(frozen=True)
class NotConnected:
    """F -> S: this process had no descriptor left for the channel to worker `index`; try again later."""

    index: int


@dataclass(frozen=True)
class Progress:
    """P -> S: the current step, for /readyz."""

    text: str


@dataclass(frozen=True)
class Prepared:
    """P -> S, the last message: everything is in place. `seconds` is by step, for dinov3_model_load_seconds."""

    provisioned: Provisioned
    seconds: dict[str, float]


@dataclass(frozen=True)
class MetricsSnapshot:
    """F -> S and W -> S, every SNAPSHOT_SECONDS, which also shows that the process is not stuck."""

    snapshot: Any


@dataclass(frozen=True)
class Hello:
    """W -> F, the first message: the frontend's arena is attached and it may submit jobs for this model."""

    info: ModelInfo


@dataclass(frozen=True)
class Attach:
    """F -> W, the first message, with the descriptor of the frontend's arena."""

    nbytes: int


class Submit(NamedTuple):
    """F -> W: compute `rows` of `block`, as the job of that number.

    Times are in seconds of CLOCK_MONOTONIC, which is the same in all processes.
    """

    job: int
    block: Block
    rows: tuple[int, ...]
    enqueued: float
    deadline: float | None
    bulk: bool
    quarantined: bool  # run each row in a batch of its own: a worker died while it was on the device
    caller: Caller = ANONYMOUS


class Cancel(NamedTuple):
    """F -> W: the results of this job are no longer wanted."""

    job: int


class JobRows(NamedTuple):
    """Some rows of a job."""

    job: int
    rows: tuple[int, ...]


class Started(NamedTuple):
    """W -> F: these rows are about to reach the device. Sent before they do, so that a crash can be traced to them."""

    jobs: tuple[JobRows, ...]


class JobResult(NamedTuple):
    """The results of one batch for one job. `failed` maps each row that has no features to the reason."""

    job: int
    rows: tuple[int, ...]
    failed: dict[int, str]
    queue_seconds: float  # the longest of these rows
    inference_seconds: float
    batch_images: int


class Load(NamedTuple):
    """Tokens that a worker has of other frontends: on the device, and queued by priority."""

    running: int = 0
    interactive: int = 0
    bulk: int = 0

    @property
    def tokens(self) -> int:
        return self.running + self.interactive + self.bulk


NO_LOAD = Load()


def total_load(loads: Iterable[Load]) -> Load:
    """Return the sum of `loads`."""
    return Load(*map(sum, zip(NO_LOAD, *loads, strict=True)))


class LoadReport(NamedTuple):
    """W -> F, from time to time: the load of the other frontends, and the last batch of the device if it is news."""

    others: Load
    batch: BatchTime | None


class Results(NamedTuple):
    """W -> F: the features of these rows are in the arena. `others` and `batch` are as in `LoadReport`."""

    jobs: tuple[JobResult, ...]
    others: Load
    batch: BatchTime | None

    def __reduce__(self) -> tuple[Callable[..., Results], tuple[object, ...]]:
        """Take the message apart for pickle, which is faster with plain tuples than with named ones."""
        batch = None if self.batch is None else tuple(self.batch)
        return unpickled_results, (tuple(map(tuple, self.jobs)), tuple(self.others), batch)


class Dropped(NamedTuple):
    """W -> F: these rows will not be computed. "late": they could not have ended before their deadline."""

    job: int
    rows: tuple[int, ...]
    reason: Literal["cancelled", "expired", "late"]


def unpickled_results(
    jobs: tuple[tuple[Any, ...], ...], others: tuple[int, ...], batch: tuple[Any, ...] | None
) -> Results:
    """Return the message that `Results.__reduce__` took apart."""
    return Results(tuple(JobResult(*job) for job in jobs), Load(*others), None if batch is None else BatchTime(*batch))


# The types in the messages of a request are pickled as one byte instead of the names of a module and a class, which
# halves the time. copyreg reserves these codes for private use.
_PICKLED_BY_CODE: tuple[Any, ...] = (
    *(Submit, Cancel, JobRows, Started, JobResult, Load, LoadReport, Results, Dropped),
    *(BatchTime, Caller, PixelShape, unpickled, unpickled_results),
)
for _code, _pickled in enumerate(_PICKLED_BY_CODE, 0xF0):
    copyreg.add_extension(_pickled.__module__, _pickled.__qualname__, _code)
