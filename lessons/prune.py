"""A smaller LLaMA out of a larger one: heads, FFN channels, layers and width removed, the rest as
it was. The paper's pruned models.

    python lessons/prune.py        # tiny with a fifth of its parameters: runs/tiny-pruned
    python lessons/prune.py --ckpt llama2-7b --keep 0.2 --out runs/small
                                   # the shape of Sheared-LLaMA-1.3B, to a few channels
    python lessons/prune.py --heal 2000 --out runs/tiny-healed
                                   # then trains all that is left on tiny's corpus
    python lessons/sweep.py fig1 --ckpt runs/tiny-pruned --ranks 8 16 32 64 128
                                   # Table II's ranks

What is removed is what would be missed least, by one rule for all: input j of a linear layer W adds
mean(x_j²) · ‖W[:, j]‖² to its output, measured on some texts, as a share of the layer's whole. A
head is its inputs of o_proj, an FFN channel its input of down_proj, a channel of the residual
stream its inputs of all that read the stream. A layer counts by how far it turns the stream: 1 −
cos(before, after).

Parameters are all counted, embeddings too, a tied head once. --keep fixes the shape: three quarters
of the layers, heads (and with them the width: in this model the heads' widths sum to it) by the
root of what remains, and FFN channels to fill the count. From LLaMA2-7B to a fifth that makes 24
layers, 16 heads and width 2048, which are Sheared-LLaMA-1.3B's; grouped heads go by whole groups.

The texts are fine-tuning records; for a checkpoint with tiny's tokenizer they are what it has read,
tiny's corpus.
"""

import argparse
import math
import shutil
import sys
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

from rows import ROOT, checkpoint_digest

sys.path.insert(0, str(ROOT))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing import run_folder as runs
from plumbing.hf_files import TensorFiles
from data import DataError, Record, encode_records, epoch_order, load_examples
from plumbing.flags import (
    DTYPES,
    FlagError,
    exit_code,
    find_checkpoint,
    find_device,
    find_dtype,
    row_of,
)
from llama import Llama, LlamaConfig, load_llama, save_llama
from plumbing.finding import find_tokenizer
from rora import validation_loss

READERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "gate_proj",
    "up_proj",
    "lm_head",
)  # of the residual stream
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


# --- what shape ---------------------------------------------------------------------------------


def parameters(cfg: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(cfg).parameters())


def smaller(cfg: LlamaConfig, keep: float) -> LlamaConfig:
    """The same family of shapes at `keep` of the parameters, or a little less. Raises FlagError
    where nothing fits.
    """
    layers = max(1, round(0.75 * cfg.n_layers))
    groups = max(1, int(cfg.n_kv_heads * math.sqrt(keep * cfg.n_layers / layers)))
    heads = groups * (cfg.n_heads // cfg.n_kv_heads)
    new = replace(cfg, n_layers=layers, n_heads=heads, n_kv_heads=groups, dim=heads * cfg.head_dim)
    channel = 3 * layers * new.dim  # parameters of one FFN channel in every layer
    step = 8 if cfg.hidden_dim >= 64 else 1
    hidden = min(
        cfg.hidden_dim,
        int((keep * parameters(cfg) - parameters(replace(new, hidden_dim=1))) / channel + 1)
        // step
        * step,
    )
    if hidden < 1:
        raise FlagError(
            f"--keep {keep:g} leaves no FFN beside {heads} heads of width {cfg.head_dim}, "
            f"{layers} layers and the embeddings"
        )
    return replace(new, hidden_dim=hidden)


# --- what is missed least -----------------------------------------------------------------------


class Missed:
    """Run the model on texts; then .share[linear layer's name][j] is what its input j contributes,
    and .turn[i] how far layer i turns the stream, and .kept_energy(channels) what each norm would
    see of its input's square were only these channels left.
    """

    def __init__(self, model: Llama, records: list[Record], batch: int):
        self.linear: dict[str, Tensor] = {}  # Σ x_j² of each linear layer
        self.norm: dict[str, Tensor] = {}  # Σ x_j² / Σ over channels of it, of each norm
        self.turn = [0.0] * model.cfg.n_layers
        hooks = [
            m.register_forward_pre_hook(
                lambda m, args, name=name: self.add(
                    self.linear, name, args[0].detach().float().square()
                )
            )
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear)
        ]
        hooks += [
            m.register_forward_pre_hook(
                lambda m, args, name=name: self.add(
                    self.norm, name, F.normalize(args[0].detach().float(), dim=-1) ** 2
                )
            )
            for name, m in model.named_modules()
            if name.endswith("norm")
        ]
        hooks += [
            m.register_forward_hook(
                lambda m, args, y, i=i: self.add_turn(i, args[0].detach(), y.detach())
            )
            for i, m in enumerate(model.layers)
        ]
        self.loss = validation_loss(model, records, batch)
        for hook in hooks:
            hook.remove()
        self.share = {}
        for name, squares in self.linear.items():
            score = squares * model.get_submodule(name).weight.detach().float().square().sum(0)
            self.share[name] = score / score.sum()

    def add(self, sums: dict[str, Tensor], name: str, squares: Tensor) -> None:
        sums[name] = sums.get(name, 0) + squares.sum(0)

    def add_turn(self, i: int, before: Tensor, after: Tensor) -> None:
        self.turn[i] += (
            (1 - F.cosine_similarity(before.float(), after.float(), dim=-1)).sum().item()
        )

    def kept_energy(self, norm: str, channels: Tensor) -> float:
        return (self.norm[norm][channels].sum() / self.norm[norm].sum()).item()


def most(scores: Tensor, n: int) -> Tensor:
    """Where the n largest are, in their old order."""
    return scores.topk(n).indices.sort().values


# --- the smaller model --------------------------------------------------------------------------


def prune(model: Llama, cfg: LlamaConfig, missed: Missed) -> tuple[Llama, dict]:
    """(a model of shape cfg made of pieces of `model`, which pieces). Where what is removed did
    nothing, it computes the same.

    A norm divides by the root mean square over the channels. With the small ones gone that root is
    larger, so its weight takes the factor that makes up for it on the texts' average.
    """
    old, share = model.cfg, missed.share
    layers = most(torch.tensor(missed.turn), cfg.n_layers).tolist()
    readers = [s for name, s in share.items() if name.rpartition(".")[2] in READERS]
    C = most(torch.stack(readers).sum(0), cfg.dim)
    spread = lambda groups, width: (
        groups[:, None] * width + torch.arange(width, device=groups.device)
    ).flatten()
    new = Llama(cfg).to(model.embed_tokens.weight.device, model.embed_tokens.weight.dtype).eval()
    kept: dict = {"layers": layers, "channels": C.tolist(), "groups": [], "ffn": []}

    def take(target: nn.Module, source: nn.Module, rows: Tensor | None, columns: Tensor) -> None:
        W = source.weight.detach()
        target.weight.copy_(W[:, columns] if rows is None else W[rows][:, columns])

    def take_norm(name: str, target: nn.Module, source: nn.Module) -> None:
        target.weight.copy_(
            source.weight[C] * math.sqrt(old.dim / cfg.dim * missed.kept_energy(name, C))
        )

    with torch.no_grad():
        take(new.embed_tokens, model.embed_tokens, None, C)
        take(new.lm_head, model.lm_head, None, C)
        take_norm("norm", new.norm, model.norm)
        for layer, i in zip(new.layers, layers):
            source, at = model.layers[i], f"layers.{i}"
            queries = (
                old.n_heads // old.n_kv_heads * old.head_dim
            )  # width of the query heads that share a key head
            G = most(
                share[f"{at}.self_attn.o_proj"].view(old.n_kv_heads, -1).sum(1), cfg.n_kv_heads
            )
            hidden = most(share[f"{at}.mlp.down_proj"], cfg.hidden_dim)
            Q, K = spread(G, queries), spread(G, old.head_dim)
            for name, rows in (("q_proj", Q), ("k_proj", K), ("v_proj", K)):
                take(
                    layer.self_attn.get_submodule(name),
                    source.self_attn.get_submodule(name),
                    rows,
                    C,
                )
            take(layer.self_attn.o_proj, source.self_attn.o_proj, C, Q)
            take(layer.mlp.gate_proj, source.mlp.gate_proj, hidden, C)
            take(layer.mlp.up_proj, source.mlp.up_proj, hidden, C)
            take(layer.mlp.down_proj, source.mlp.down_proj, C, hidden)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                take_norm(f"{at}.{norm}", layer.get_submodule(norm), source.get_submodule(norm))
            kept["groups"].append(G.tolist())
            kept["ffn"].append(hidden.tolist())
    return new, kept


# --- tiny's corpus ------------------------------------------------------------------------------


def corpus(seed: int) -> tuple[Iterator[str], ModuleType]:
    """(documents of tiny's last stage of pretraining, the module that knows how to learn them)."""
    sys.path.insert(0, str(ROOT / "tiny"))
    import pretrain

    _, style, mix = list(pretrain.STAGES.values())[-1]
    return pretrain.Corpus(pretrain.build_world(), seed, *style).documents(mix), pretrain


def heal(model: Llama, steps: int) -> None:
    """Train all but the embeddings on tiny's corpus, as tiny/pretrain.py does: what Sheared-LLaMA
    had 50 billion tokens of. The embeddings stay, since the corpus never uses the tasks' words and
    would make one word of them all.
    """
    documents, pretrain = corpus(seed=99)
    stream = pretrain.batches(pretrain.load_tokenizer(ROOT / "tiny"), documents)
    optimizers = pretrain.optimizers(model)
    optimizers[1].param_groups[0]["params"] = [
        p for p in optimizers[1].param_groups[0]["params"] if p is not model.embed_tokens.weight
    ]
    peaks = [o.param_groups[0]["lr"] for o in optimizers]
    model.train()
    for step in range(steps):
        loss = pretrain.weighted_loss(model, *next(stream))
        loss.backward()
        for optimizer, peak in zip(optimizers, peaks):
            optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 50) * (1 - step / steps)
            optimizer.step()
        model.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"healing {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)


def texts(args: argparse.Namespace, tokenizer, of_tiny: bool) -> list[Record]:
    """Twice --records of them."""
    n = 2 * args.records
    if of_tiny and not args.data:
        documents, pretrain = corpus(seed=98)
        return [
            Record(array("i", pretrain.encode(tokenizer, d)[0]), 1, i)
            for i, d in enumerate(islice(documents, n), 1)
        ]
    examples = load_examples(args.data or row_of(args.ckpt).data)
    return encode_records(
        [examples[i] for i in epoch_order(len(examples), 0, 0)[:n]], tokenizer, 256
    )[0]


# --- command line -------------------------------------------------------------------------------


def shape(cfg: LlamaConfig) -> str:
    heads = f"{cfg.n_heads}" + (
        f" ({cfg.n_kv_heads} groups)" if cfg.n_kv_heads != cfg.n_heads else ""
    )
    total, table = parameters(cfg), cfg.vocab_size * cfg.dim * (1 if cfg.tie_embeddings else 2)
    return (
        f"{total:,} parameters, {table:,} of them embeddings: {cfg.n_layers} layers, "
        f"width {cfg.dim}, {heads} heads of {cfg.head_dim}, FFN {cfg.hidden_dim}"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--ckpt", default="tiny", metavar="NAME", help="default: tiny")
    parser.add_argument(
        "--keep", type=float, default=0.2, metavar="SHARE", help="of all parameters (default 0.2)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/CKPT-pruned")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="records to measure on (default: tiny's corpus, or the checkpoint's training records)",
    )
    parser.add_argument(
        "--records",
        type=int,
        default=128,
        metavar="N",
        help="how many, and as many again to measure the loss on (default 128)",
    )
    parser.add_argument(
        "--heal",
        type=int,
        default=0,
        metavar="STEPS",
        help="of training on tiny's corpus afterwards (tiny alone)",
    )
    parser.add_argument("--device", metavar="NAME")
    args = parser.parse_args(argv)
    out = args.out or Path(f"runs/{Path(args.ckpt).name}-pruned")
    runs.check_writable(out)
    if out.exists():
        raise runs.RunError(f"{out} exists; prune writes a new folder")
    if not 0 < args.keep < 1:
        raise FlagError(f"--keep {args.keep:g}: a share between 0 and 1")
    folder = find_checkpoint(args.ckpt)
    of_tiny = (folder / "tokenizer.model").is_file() and runs.sha256(
        folder / "tokenizer.model"
    ) == runs.sha256(ROOT / "tiny" / "tokenizer.model")
    if args.heal and not of_tiny:
        raise FlagError("--heal reads tiny's corpus: it needs a checkpoint with tiny's tokenizer")
    old = LlamaConfig.from_json(folder / "config.json")
    cfg = smaller(old, args.keep)
    records = texts(args, find_tokenizer(args.ckpt), of_tiny)
    half = len(records) // 2
    if not half:
        raise DataError("at least two texts are needed: one to measure on, one for the loss")
    device = find_device(args.device)
    model = load_llama(folder, device, DTYPES[find_dtype(None, args.ckpt, device)])
    small, kept = prune(model, cfg, Missed(model, records[:half], 8))
    print(
        f"from {shape(old)}\nto   {shape(cfg)}: {100 * parameters(cfg) / parameters(old):.1f}%\n"
        f"layers kept: {kept['layers']}"
    )
    losses = {
        "whole": validation_loss(model, records[half:], 8),
        "pruned": validation_loss(small, records[half:], 8),
    }
    if args.heal:
        heal(small.cpu().float(), args.heal)
        losses["healed"] = validation_loss(small, records[half:], 8)
    print(
        "loss per token on other texts: "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    )
    with runs.new_folder(out) as temporary:
        save_llama(small.to(TensorFiles(folder).dtypes["embed_tokens.weight"]), temporary)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        runs.write_json(
            temporary / "pruned.json",
            {
                "from": args.ckpt,
                "checkpoint": checkpoint_digest(folder),
                "keep": args.keep,
                "parameters": [parameters(old), parameters(cfg)],
                "texts": half,
                "heal": args.heal,
                "loss": losses,
                "kept": kept,
            },
        )
    print(f"saved {out}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "prune"))
