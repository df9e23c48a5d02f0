"""What fits which GPU, and the hours it would take: python bench/fits.py. Nothing is measured: no
GPU is needed, none is used.

Activations are counted as --check counts them, on one block (memory.plan), here of a model without
memory (torch's meta device) that takes CUDA's ways: 3 to 6% more than --check says on an H100, and
6 to 8% more than a step took there. Hours are FLOPs over a rate that one states.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention.varlen import varlen_attn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import fast
import llama
import rora
from data import Batch
from llama import Llama, LlamaConfig
from plumbing import memory
from turns import table
from worker import SHAPES, linear_weights

MODELS = {
    "sheared-llama-1.3b": LlamaConfig(2048, 24, 16, 16, 5504),
    **{name: SHAPES[name] for name in ("llama-7b", "llama3-8b", "llama-13b")},
}
TOKENS = 3200  # in the largest micro-batch of 16 records: an estimate, like the next line's 137
RECORDS, MEAN, EPOCHS = 170_300, 137, 3  # of the run: records, tokens in one, epochs
CARDS, RESERVED = (
    (24, 48, 80),
    0.92,
)  # GB as sold (GiB), and the share of it that rora.py plans with
CONTEXT = 0.6e9  # CUDA's own, before the first tensor
RATE, CARD = 110e12, "A6000"  # FLOP/s: about what bf16 products alone reach there, of 155 on paper


def plan(cfg: LlamaConfig, method: str, rank: int, dropout: float) -> memory.MemoryPlan:
    """memory.plan for CUDA in bf16. Two blocks stand for all."""
    two = LlamaConfig(**{**vars(cfg), "n_layers": 2})
    with torch.device("meta"):
        model = Llama(two).to(torch.bfloat16)
    rora.attach(model, method, rank, dropout=dropout)
    model.train()
    ids = torch.zeros(TOKENS, dtype=torch.long)
    lengths = [TOKENS // 16] * 16
    # what F.dropout calls on CUDA
    dropped = lambda x, p, training=True, inplace=False: torch.native_dropout(x, p, training)[0]
    with (
        mock.patch.object(torch.Tensor, "is_cuda", property(lambda t: True)),
        mock.patch("torch.nn.functional.dropout", dropped),
        mock.patch("torch.nn.functional.rms_norm", lambda *x: torch._fused_rms_norm(*x)[0]),
        mock.patch.object(torch.Tensor, "tolist", lambda t: [False] * len(t)),
        mock.patch.multiple(
            llama,
            varlen_attn=varlen_attn,
            VARLEN_CAUSAL={"window_size": (-1, 0)},
            VARLEN_GROUPED={"enable_gqa": True},
        ),
        fast.held(model),
    ):
        p = memory.plan(model, Batch(ids, ids, lengths), 1 << 28)
    per_block = sum(x.nbytes for x in model.layers[0].parameters() if not x.requires_grad)
    trained = sum(x.numel() for x in model.layers[0].parameters() if x.requires_grad)
    L = cfg.n_layers
    return memory.MemoryPlan(
        TOKENS,
        p.weights + (L - 2) * per_block,
        p.adapters + (L - 2) * trained * 18,
        p.block,
        p.block_input,
        p.logits,
        L,
    )


def hours(cfg: LlamaConfig, p: memory.MemoryPlan, recomputed: int) -> float:
    """4 FLOPs a frozen weight and token (6 an adapter's), 2 more where a block is recomputed."""
    adapters = p.adapters / 18
    flops = (
        4 * linear_weights(cfg)
        + 6 * adapters
        + 2 * (linear_weights(cfg) - cfg.vocab_size * cfg.dim + adapters) * recomputed / p.blocks
    )
    return EPOCHS * RECORDS * MEAN * flops / RATE / 3600


def row(name: str, rank: int, dropout: float) -> list[str]:
    """LoRA's and RoRA's figure, and DoRA's after it where it is another."""
    plans = [plan(MODELS[name], method, rank, dropout) for method in ("rora", "dora")]
    both = lambda figures: figures[0] if figures[0] == figures[1] else ", ".join(figures)
    cells = [
        name,
        str(rank),
        both([f"{p.total(0) / 1e9:.0f}" for p in plans]),
        both([f"{p.total(p.blocks) / 1e9:.0f}" for p in plans]),
    ]
    for card in CARDS:
        room = int(RESERVED * (card * 2**30 - CONTEXT))
        fewest = [p.fewest_recomputed(room) for p in plans]
        cells.append(
            both(
                [
                    "no" if p.total(k) > room else f"{k} of {p.blocks}" if k else "none"
                    for p, k in zip(plans, fewest)
                ]
            )
        )
        if card == 48:
            time = both(
                [
                    f"{hours(MODELS[name], p, k):.1f}" if p.total(k) <= room else "–"
                    for p, k in zip(plans, fewest)
                ]
            )
    return [*cells, time]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dropout", type=float, default=0.05)
    args = parser.parse_args()
    rows = [row(name, rank, args.dropout) for name in MODELS for rank in (32, 128)]
    print(
        table(
            [
                "model",
                "r",
                "GB, no block recomputed",
                "GB, all",
                *(f"{c} GB" for c in CARDS),
                f"hours, {CARD}",
            ],
            rows,
        )
    )


if __name__ == "__main__":
    main()
