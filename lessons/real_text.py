"""Fig. 3 on real records: loss against step for LoRA, DoRA and RoRA on a small LLaMA that has read
some English first.

    python lessons/real_text.py            about ten minutes on two cores; results/real_text.jsonl,
                                           then the picture
    python lessons/real_text.py --quick    the path in seconds, into runs/lessons/real_text-quick;
                                           its numbers mean nothing

The records are the paper's, as many as can be had (BoolQ, OpenBookQA, both ARCs), the tokenizer is
LLaMA's; $RORA_DATA names the folder that holds both. The model is our own: four layers, width 192.
A random model would have nothing to adapt, so first all of it learns the plain text of one half of
the records: questions and options, without prompt, labels or answers. Then the three methods fine-
tune it on the other half through rora.py, at one rank r and at two learning rates a factor √r
apart: if RoRA is LoRA with a larger step, LoRA at the second shows it. A model of this size learns
the wording, not the commonsense, so the curves are about optimisation and no accuracy is reported.

Stopped, the same command goes on: the base model and every finished run are kept in
runs/lessons/real_text.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from array import array
from pathlib import Path

import real_text_plot
from rows import HERE, METHODS, ROOT, append, checkpoint_digest, read

sys.path.insert(0, str(ROOT))
import torch
from torch import nn

import rora
from plumbing import run_folder as runs
from data import Record, epoch_order, load_examples, load_tokenizer
from plumbing.flags import FlagError, exit_code
from llama import Llama, LlamaConfig, save_llama
from rora import learning_rate, train_step, validation_loss

FULL = {
    "shape": {"dim": 192, "n_layers": 4, "n_heads": 6, "hidden_dim": 512},
    "pretrain": 550,
    "texts": 16,
    "lr": 2e-3,
    "rank": 64,
    "alpha": 64,
    "lrs": [4e-4, 4e-4 * 8],
    "steps": 240,
    "batch": 8,
    "val": 64,
    "seed": 0,
}
QUICK = FULL | {
    "shape": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48},
    "pretrain": 2,
    "texts": 2,
    "rank": 4,
    "lrs": [4e-4, 4e-4 * 2],
    "steps": 6,
    "batch": 2,
    "val": 2,
}


def halves(records: Path) -> tuple[list[dict], list[dict]]:
    """(for the base model, for fine-tuning)."""
    examples = load_examples(records)
    order = epoch_order(len(examples), 0, 0)
    middle = len(order) // 2
    return [examples[i] for i in order[:middle]], [examples[i] for i in order[middle:]]


def plain(example: dict) -> str:
    """What a record talks about: no prompt, no "Answer2:", no answer."""
    text = example["instruction"].split("question: ", 1)[-1].rsplit("\n\nAnswer format", 1)[0]
    return re.sub(r"\b(Answer|Solution|Ending|Option)\d: ", "", text).replace("\n\n", " ")


def make_base(folder: Path, examples: list[dict], tokenizer_file: Path, size: dict) -> None:
    """A LLaMA that has read the plain text of the examples, as a checkpoint folder. base.json says
    what came of it.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    texts = [
        Record(array("i", tokenizer.encode(plain(e), bos=True, eos=True)[:256]), 1, i)
        for i, e in enumerate(examples, 1)
    ]
    held_out, texts = texts[: size["val"]], texts[size["val"] :]
    torch.manual_seed(size["seed"])
    model = Llama(
        LlamaConfig(
            **size["shape"],
            n_kv_heads=size["shape"]["n_heads"],
            vocab_size=tokenizer.vocab_size,
            tie_embeddings=True,
        )
    )
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, 0, 0.02)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=size["lr"], betas=(0.9, 0.95), weight_decay=0.0
    )
    before, model = validation_loss(model, held_out, 8), model.train()
    for step in range(size["pretrain"]):
        batch = [
            texts[i % len(texts)] for i in range(step * size["texts"], (step + 1) * size["texts"])
        ]
        loss, _ = train_step(
            model,
            batch,
            optimizer,
            learning_rate(step + 1, size["pretrain"] + 1, size["lr"], 20),
            size["texts"],
        )
        optimizer.zero_grad()
        if step % 25 == 0 or step + 1 == size["pretrain"]:
            print(f"reading {step + 1}/{size['pretrain']}  loss {loss:.3f}", flush=True)
    seen = min(len(texts), size["pretrain"] * size["texts"])
    with runs.new_folder(folder) as temporary:
        save_llama(model, temporary)
        shutil.copyfile(tokenizer_file, temporary / "tokenizer.model")
        runs.write_json(
            temporary / "base.json",
            {
                "parameters": sum(p.numel() for p in model.parameters()),
                "texts": seen,
                "tokens": sum(len(t.ids) for t in texts[:seen]),
                "loss_before": before,
                "loss_after": validation_loss(model, held_out, 8),
            },
        )


def fine_tune(
    base: Path, data: Path, out: Path, method: str, lr: float, size: dict
) -> tuple[int, dict]:
    """(rora.py's exit code, the row of the results file)."""
    settings = {
        "method": method,
        "rank": size["rank"],
        "alpha": size["alpha"],
        "lr": lr,
        "max-steps": size["steps"],
        "warmup": size["steps"] // 10,
        "batch-size": size["batch"],
        "val-size": size["val"],
        "eval-every": size["steps"],
        "seed": size["seed"],
    }
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    if code := rora.main(
        ["--ckpt", str(base), "--data", str(data), "--out", str(out), "--overwrite", *flags]
    ):
        return code, {}
    record = json.loads((out / "run.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return 0, {
        "settings": settings,
        "scale": record["effective_scale"],
        "val_loss": record["best_loss"],
        "seconds": record["seconds"],
        "trainable": record["trainable"],
        "torch": record["packages"]["torch"],
        "loss": [round(s["loss"], 4) for s in steps if "loss" in s],
    }


def main(argv: list[str]) -> int:
    given = Path(os.environ.get("RORA_DATA") or ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--records", type=Path, default=given / "train" / "commonsense_mini.json", metavar="FILE"
    )
    parser.add_argument("--tokenizer", type=Path, default=given / "tokenizer.model", metavar="FILE")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    if not args.tokenizer.is_file():
        raise FlagError(
            f"no tokenizer {args.tokenizer}; set RORA_DATA, or give --records and --tokenizer"
        )
    size, work = (
        (QUICK, ROOT / "runs/lessons/real_text-quick")
        if args.quick
        else (FULL, ROOT / "runs/lessons/real_text")
    )
    results = work / "real_text.jsonl" if args.quick else HERE / "results" / "real_text.jsonl"
    reading, tuning = halves(args.records)
    made_of = hashlib.sha256(
        json.dumps([runs.sha256(args.records), runs.sha256(args.tokenizer), size]).encode()
    ).hexdigest()[:8]
    base, data = (
        work / f"base-{made_of}",
        work / f"train-{made_of}.json",
    )  # other records or another size: another base
    runs.write_json(data, tuning)
    if not base.exists():
        make_base(base, reading, args.tokenizer, size)
    facts = {
        "base": checkpoint_digest(base),
        "records_sha256": runs.sha256(args.records)[:16],
        "size": size,
        **json.loads((base / "base.json").read_text()),
    }
    same = lambda row: all(row.get(key) == facts[key] for key in ("base", "records_sha256", "size"))
    done = {
        (row["settings"]["method"], row["settings"]["lr"]) for row in read(results) if same(row)
    }
    for lr in size["lrs"]:
        for method in METHODS:
            if (method, lr) in done:
                continue
            code, row = fine_tune(base, data, work / f"{method}-lr{lr:g}", method, lr, size)
            if code == 4:
                continue  # its loss was no longer finite, as rora.py has said: no curve to show
            if code:
                return code
            append(results, facts | row)
    return real_text_plot.main(
        ["--results", str(results)] + (["--out", str(work)] if args.quick else [])
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "real_text"))
