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


def index() -> int:
    """This process's number, from 0; RANK is torchrun's word for it."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, and let process 0 alone speak. If one dies, the others fail at
    their next meeting."""
    if world() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30)
    )
    stdout = sys.stdout
    try:
        if not first():
            sys.stdout = open(os.devnull, "w")
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
