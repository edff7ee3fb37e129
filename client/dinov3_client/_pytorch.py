"""What the client does differently in programs that use PyTorch, without importing it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that torch.compile leaves as it is, and everything that it calls.

    Calls over the network and arrays of received bytes cannot be traced. The same as `torch.compiler.disable`, which
    would import the compiler, and torch, into every program.
    """
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if disabled is None:
            dynamo = sys.modules.get("torch._dynamo")
            if dynamo is None:  # nothing was compiled yet
                return function(*args, **kwargs)
            disabled = dynamo.disable(function)
            dynamo.disable(call, recursive=False)  # else compiled again for each kind of arguments
        return disabled(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # the graph of a caller ends before the call
    return call


def in_dataloader_worker() -> bool:
    """Return whether this process is a worker of a DataLoader."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and data.get_worker_info() is not None
