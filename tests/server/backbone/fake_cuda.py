"""A fake torch.cuda without a device: streams run their work later, in any order that events allow.

Work on a stream is queued and runs, on the CPU, when something waits for it; until then its results
hold rubbish. So is what a captured graph left in memory that its pool's graphs share, once another of them is
replayed. A read that nothing orders after its write therefore reads rubbish, in some order if not in the first.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Step = Callable[[], bool]  # runs and returns True, or returns False if it must wait


class FakeCuda:
    """A stand-in for torch.cuda. `log` records the calls in order. `seed` picks the order of the streams' work; without
    one all work runs at once."""

    def __init__(self, seed: int | None = None) -> None:
        self.log: list[str] = []
        self.registered: set[int] = set()
        self.register_result = 0
        self.last_error = 0  # what the next kernel would report as its own
        self.capturing: CUDAGraph | None = None
        self.capture_fails: Exception | None = None
        self.graphs: list[CUDAGraph] = []
        self.done = 0  # steps of work
        self._random = None if seed is None else random.Random(seed)
        self._streams: list[Stream] = []
        self._current: Stream | None = None
        self._begun: set[str] = set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace torch in the CUDA runner's modules."""
        for module in ("cuda", "cuda_graphs"):
            monkeypatch.setattr(f"dinov3_server.backbone.runners.{module}.torch", FakeTorch(self))

    # --- what the runner calls ---------------------------------------------------------------------

    def Stream(self) -> Stream:
        self._streams.append(Stream(self, ("copy_in", "compute", "copy_out")[len(self._streams)]))
        return self._streams[-1]

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:
        return Event(self)

    def CUDAGraph(self) -> CUDAGraph:
        return CUDAGraph(self)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            with _Recorder(self):
                yield
        finally:
            self._current = before

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self, device: torch.device | None = None) -> None:
        self.log.append("host waits for everything")
        self.work_until(lambda: not any(stream.todo for stream in self._streams))

    def empty_cache(self) -> None:
        self.log.append("cache emptied")

    def memory_allocated(self, device: torch.device) -> int:
        return 0

    def memory_reserved(self, device: torch.device) -> int:
        return 0

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=1 << 30)

    def cudart(self) -> SimpleNamespace:
        def register(address: int, size: int, flags: int) -> int:
            if not self.register_result:
                self.registered.add(address)
            self.last_error = self.register_result
            return self.register_result

        return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=self.registered.remove)

    # --- how it works ------------------------------------------------------------------------------

    @property
    def current(self) -> Stream:
        assert self._current is not None, "work on the default stream"
        return self._current

    def queue(self, step: Step) -> None:
        """Append a step to the current stream, or to the graph being captured."""
        if self.capturing is not None:
            self.capturing.steps.append(step)
            return
        self.current.todo.append(step)
        if self._random is None:
            self.work_until(lambda: False)

    def work_until(self, reached: Callable[[], bool]) -> None:
        """Run the streams' steps one at a time, until the condition holds or none can run."""
        assert self.capturing is None, "waited for the device during a capture"
        streams = list(self._streams)
        while streams and not reached():
            stream = self._random.choice(streams) if self._random else streams[0]
            with torch.inference_mode(), _disable_current_modes():
                moved = bool(stream.todo) and stream.todo[0]()
            if moved:
                self.done += 1
                stream.todo.popleft()
                streams = list(self._streams)
            else:
                streams.remove(stream)

    def recorded(self, event: Event) -> None:
        # Each stream's first event of a batch is its begin, the second its end.
        self._begun ^= {self.current.name}
        event.name = f"{self.current.name} {'begin' if self.current.name in self._begun else 'end'}"
        self.log.append(event.name)

    def launch_kernel(self) -> None:
        error, self.last_error = self.last_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error} of an earlier call")

    def call(self, operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator on a stream."""
        self.launch_kernel()
        if self.capturing is not None and self.capture_fails is not None:
            raise self.capture_fails
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [
            kwargs[argument.name] if argument.name in kwargs else args[i]
            for i, argument in enumerate(operator._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            self.queue(lambda: _true(operator(*args, **kwargs)))
            return written[0]
        result = operator(*args, **kwargs)
        made = tree_leaves(result)
        assert all(isinstance(t, Tensor) for t in made), f"{operator} waits for the device"
        if _addresses(made) & _addresses(given) or operator._schema.name in ("aten::empty", "aten::empty_like"):
            return result

        def run() -> bool:
            for old, new in zip(made, tree_leaves(operator(*args, **kwargs)), strict=True):
                old.copy_(new)
            return True

        rubbish(made)
        self.queue(run)
        if self.capturing is not None:
            self.capturing.made += made
        return result


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.name = name
        self.todo: deque[Step] = deque()
        self._cuda = cuda

    def wait_event(self, event: Event) -> None:
        assert self._cuda.capturing is None
        self._cuda.log.append(f"{self.name} waits for {event.name}")
        times = event.times_recorded
        self.todo.append(lambda: event.times_reached >= times)


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.name = ""
        self.times_recorded = 0
        self.times_reached = 0
        self._cuda = cuda

    def record(self) -> None:
        assert self._cuda.capturing is None
        self._cuda.recorded(self)
        self.times_recorded += 1

        def reach() -> bool:
            self.times_reached += 1
            return True

        self._cuda.queue(reach)

    def synchronize(self) -> None:
        self._cuda.log.append(f"host waits for {self.name}")
        times = self.times_recorded
        self._cuda.work_until(lambda: self.times_reached >= times)
        assert self.times_reached >= times, "waited for ever"

    def elapsed_time(self, other: Event) -> float:
        assert self.times_reached == self.times_recorded
        assert other.times_reached == other.times_recorded
        return 1000.0


class CUDAGraph:
    """A captured graph: each replay queues the captured steps again."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.steps: list[Step] = []
        self.made: list[Tensor] = []
        self._cuda = cuda
        self._pool: object = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert self._cuda.capturing is None
        assert capture_error_mode == "thread_local"
        assert pool is None or any(graph._pool is pool for graph in self._cuda.graphs)
        self._pool = pool or object()
        self._cuda.log.append("capture begins")
        self._cuda.graphs.append(self)
        self._cuda.capturing = self

    def capture_end(self) -> None:
        assert self._cuda.capturing is self
        self._cuda.log.append("capture ends")
        self._cuda.capturing = None

    def pool(self) -> object:
        return self._pool

    def replay(self) -> None:
        self._cuda.log.append("replay")
        shared = [t for graph in self._cuda.graphs if graph._pool is self._pool for t in graph.made]
        self._cuda.queue(lambda: _true(rubbish(shared)))
        for step in self.steps:
            self._cuda.queue(step)


class _Recorder(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._cuda.call(func, args, kwargs or {})


class FakeTorch:
    """torch, except for its CUDA part and page-locked memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def ones(self, *args: Any, **kwargs: Any) -> Tensor:
        self.cuda.launch_kernel()
        return torch.ones(*args, **kwargs)

    def empty(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory and self.cuda.register_result:
            raise RuntimeError("CUDA error: no page-locked memory")
        made = torch.empty(*args, **kwargs)
        rubbish([made])
        return made


def rubbish(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        is_number = tensor.dtype != torch.bool
        tensor.fill_(math.nan if tensor.is_floating_point() or tensor.is_complex() else 77 if is_number else False)


def _addresses(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided and t.numel()}


def _true(_: object) -> bool:
    return True
