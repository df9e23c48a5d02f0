"""One process a GPU, under `torchrun --nproc_per_node=N rora.py ...`. With one process, everything
here does nothing.

Every process holds the whole model and knows the whole batch; it runs its share of the records, and
the adapters' gradients are added up. As the loss is already divided by the whole batch's targets,
the sum is the single process's gradient, and all processes make the same step. Process 0 alone
writes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ProcessError(ValueError):
    """An environment that speaks of several processes, but not so that they could meet."""


def number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def world() -> int:
    return max(1, number("WORLD_SIZE", 1))


def index() -> int:
    """This process's number, from 0: torchrun's RANK. Beside no WORLD_SIZE it is somebody else's
    variable: a likely name in a project about rank."""
    return number("RANK", 0) if world() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0


def check() -> None:
    """Raise ProcessError, by name, for a variable with which the processes could not meet."""
    size = os.environ.get("WORLD_SIZE", "1")
    advice = "start with torchrun, which sets it, or unset WORLD_SIZE"
    if not size.isdecimal() or size == "0":
        raise ProcessError(f"WORLD_SIZE is {size!r}, expected a number of processes; {advice}")
    if world() == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ProcessError(f"WORLD_SIZE is {size}, but {name} is not set; {advice}")
    for name in ("RANK", "MASTER_PORT", "LOCAL_RANK"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            raise ProcessError(f"{name} is {value!r}, expected a number; {advice}")
    if index() >= world():
        raise ProcessError(f"RANK is {index()}, but WORLD_SIZE only {size}; {advice}")
    gpus = torch.cuda.device_count()
    if gpus and number("LOCAL_RANK", 0) >= gpus:
        local = number("LOCAL_RANK", 0)
        raise ProcessError(f"LOCAL_RANK is {local}, but this machine shows {gpus} GPUs; {advice}")


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, and let process 0 alone speak. If one dies, the others fail at
    their next meeting."""
    check()
    if world() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(number("LOCAL_RANK", 0))
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(kind, timeout=timedelta(minutes=30))
    except (RuntimeError, ValueError) as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(
            f"could not meet the other processes at {where} ({str(e).splitlines()[0][:200]})"
        ) from None
    stdout = sys.stdout
    try:
        if not first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        yield
    except RuntimeError as e:
        if "gloo" in str(e) or "NCCL" in str(e):
            what = str(e).splitlines()[0][:120]
            raise ConnectionError(
                f"lost another process of the {world()} ({what}); see its own message"
            ) from None
        raise
    finally:
        sys.stdout = stdout
        dist.destroy_process_group()


def share(items: list) -> list:
    """This process's part of a list; the parts cover it without overlap, and the first is the
    longest."""
    return items[index() :: world()]


def add(t: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if world() > 1:
        dist.all_reduce(t)
    return t


def total(value: float, device: torch.device) -> float:
    """Sum a number over processes."""
    if world() == 1:
        return value
    return add(torch.tensor(value, dtype=torch.float64, device=device)).item()


def add_gradients(params: list[nn.Parameter]) -> None:
    """Sum the gradients over processes in one message. A process without records adds zeros."""
    if world() == 1:
        return
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = add(torch.cat([p.grad.flatten() for p in params]))
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(g.view_as(p))


def anyone(flag: bool, device: torch.device) -> bool:
    """True on every process if it is on one: so that all stop at the same step."""
    return flag if world() == 1 else bool(add(torch.tensor(float(flag), device=device)) > 0)


def gathered(value: object) -> list | None:
    """The values of all processes, on process 0; None elsewhere."""
    if world() == 1:
        return [value]
    values = [None] * world() if first() else None
    dist.gather_object(value, values)
    return values


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()
