"""How much memory a training step takes: measured on one block rather than derived, so that it
holds for any method, precision and attention kernel.

This file knows modules and bytes. It knows no methods.
"""

import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import Batch, Record, epoch_order
from llama import Llama
from plumbing import processes


def largest_micro_batch(
    records: list[Record], batch_size: int, micro_batch_size: int, seed: int, epochs: int
) -> list[Record]:
    """The micro-batch with the most tokens that these seeded epochs will meet; of more than 20, the
    longest records there are, which is no less."""
    if epochs > 20:
        by_length = sorted(records, key=lambda r: len(r.ids), reverse=True)
        return by_length[: min(micro_batch_size, batch_size)]
    best: tuple[int, list[int]] = (0, [])
    for epoch in range(epochs):
        order = epoch_order(len(records), seed, epoch)
        for start in range(0, len(order), batch_size):
            batch = processes.share(order[start : start + batch_size])
            for i in range(0, len(batch), micro_batch_size):
                micro = batch[i : i + micro_batch_size]
                best = max(best, (sum(len(records[j].ids) for j in micro), micro))
    return [records[j] for j in best[1]]


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """What a forward pass leaves behind for its backward pass. Weights and other tensors that were
    there before do not count: they are the ones that a second pass keeps again. Works on meta
    tensors."""
    passes: list[dict[int, int]] = []
    outputs = []  # held until the count is done, or storages would be used twice
    for _ in range(2):
        kept: dict[int, int] = {}

        def pack(t: Tensor, kept=kept) -> Tensor:
            storage = t.untyped_storage()
            kept[storage._cdata] = storage.nbytes()  # which it is; on meta it has no address
            # t itself would close a circle with the node that made it, never to be freed
            return t.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outputs.append(forward())
        passes.append(kept)
    return sum(size for address, size in passes[1].items() if address not in passes[0])


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, for the largest micro-batch of a run."""

    tokens: int  # in that micro-batch
    weights: int
    adapters: int  # fp32, their gradients, AdamW's two moments, and copies in the base's dtype
    block: int  # what one block keeps for backward
    block_input: int  # what it keeps when it is recomputed instead
    logits: int
    blocks: int  # L

    def total(self, recomputed: int) -> int:
        """With the first `recomputed` blocks recomputed."""
        return (
            self.weights
            + self.adapters
            + recomputed * self.block_input
            + self.kept_and_in_work(recomputed)
        )

    def kept_and_in_work(self, recomputed: int) -> int:
        """Either at the head, with every other block's tensors kept, or when a recomputed block is
        in work and those are gone."""
        # of a block's tensors, at the worst moment of its backward: measured, for several methods
        gradients = int(0.8 * self.block)
        at_the_head = (self.blocks - recomputed) * self.block + max(self.logits, gradients)
        return max(at_the_head, self.block + gradients) if recomputed else at_the_head

    def fewest_recomputed(self, available: int) -> int:
        """The smallest number of recomputed blocks that fits; all of them where none does."""
        return next((k for k in range(self.blocks) if self.total(k) <= available), self.blocks)

    def parts(self, recomputed: int) -> str:
        """The terms of `total`, in words."""
        kept = inputs = ""
        if recomputed < self.blocks:
            kept = f"{self.blocks - recomputed} blocks of {self.block / 1e9:.3f}, "
        if recomputed:
            inputs = f"{recomputed} recomputed ones of {self.block_input / 1e9:.3f} + "
        return (
            f"{self.weights / 1e9:.2f} GB weights + {self.adapters / 1e9:.2f} adapters and AdamW + "
            f"{inputs}{self.kept_and_in_work(recomputed) / 1e9:.2f} for {kept}gradients and "
            f"logits, at {self.tokens:,} tokens"
        )


def plan(model: Llama, batch: Batch, logit_bytes: int) -> MemoryPlan:
    """Run the first block on `batch`, with gradients as in training, and count.

    logit_bytes: of fp32 logits held at once.
    """
    device = model.lm_head.weight.device
    rows = model.rows(batch.lengths)
    x = model.embed_tokens(batch.ids.to(device)).detach().requires_grad_()
    block = saved_bytes(lambda: model.layers[0](x.clone(), rows))
    trained = [p for p in model.parameters() if p.requires_grad]
    size = model.lm_head.weight.element_size()
    slice_bytes = min(logit_bytes, 4 * batch.learned * model.cfg.vocab_size)
    return MemoryPlan(
        tokens=sum(batch.lengths),
        blocks=len(model.layers),
        block=block,
        block_input=x.nbytes,
        weights=sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        adapters=sum(p.numel() * (16 + (size if size < 4 else 0)) for p in trained),
        # fp32 logits, their gradient, the base's own; the final norm
        logits=int(slice_bytes * (2 + size / 4)) + 4 * x.numel() * 4,
    )


def available(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that this process may still take. root: where /proc and /sys are."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min(free_memory(root), *container_limits(root), address_space_left(root)))


def free_memory(root: Path) -> int:
    try:  # Linux says what could be had if the page cache gave way
        text = (root / "proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def container_limits(root: Path) -> Iterator[int]:
    """What the control groups of this process leave it: version 2, where each group bounds those
    below it, and version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            home, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            home = mount / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = home / path.strip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(home) and (left := group_leaves(folder, *names)) is not None:
                yield left


def group_leaves(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """None where the group has no limit; a container often sees its own group alone, as root."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        found = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return None
    return None if most == "max" else int(most) - used + int(found[1] if found else 0)


def address_space_left(root: Path) -> int:
    """What `ulimit -v` leaves."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return 2**63
    try:
        pages = int((root / "proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        pages = 0
    return most - pages * os.sysconf("SC_PAGE_SIZE")
