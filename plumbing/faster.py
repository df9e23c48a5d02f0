"""--compile and --graphs: steps that a GPU makes faster, where it can.

What is faster and why stands in fast.py and llama.py; this file knows when it is not to be had.
"""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

import fast
import rora
from data import Record
from llama import Llama, compile_blocks
from plumbing import processes
from plumbing.flags import FlagError, Settings
from plumbing.hf_files import first_line


def refuse_uncompilable(device: torch.device) -> None:
    """Raise FlagError where torch.compile does not work, by trying: it needs a compiler."""
    try:
        torch.compile(lambda x: x.cos() + 1)(torch.ones(64, device=device))
    except Exception as e:  # of a dozen kinds
        why = first_line(e)
        raise FlagError(
            f"--compile: torch cannot compile for {device.type} on this machine ({why}); leave it "
            "out, or install a C++ compiler"
        ) from None


def hastened(
    model: Llama, settings: Settings, recomputed: int, largest: list[Record], how: dict
) -> Callable:
    """Do to the model what `how` asks: {"compile": bool, "graphs": bool}, as run.json has it.
    Returns what rora.train takes as `backward`. largest: the micro-batch with the most tokens."""
    if how.get("compile"):
        compile_blocks(model)
    if not how.get("graphs"):
        return rora.backward
    why = fast.Graphs.refusal(model, recomputed)
    if processes.world() > 1:
        why = "they are not for several processes"
    if why is None:
        tokens = sum(len(r.ids) for r in largest)
        try:
            found = fast.Graphs(model, settings.micro_batch_size, tokens, settings.max_len)
            print(f"CUDA graphs: steps are recorded, up to {tokens:,} tokens", flush=True)
            return found.backward
        except torch.OutOfMemoryError:
            why = "they need more memory than there is"
        gc.collect()
        torch.cuda.empty_cache()
    print(f"note: --graphs is left out: {why}", flush=True)
    return rora.backward


def as_it_stands(how: dict) -> AbstractContextManager:
    """For what is done seldom, validation: without compiling it, too, in the middle of a run."""
    return torch.compiler.set_stance("force_eager") if how.get("compile") else nullcontext()
