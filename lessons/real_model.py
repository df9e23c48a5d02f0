"""Is RoRA at lr the same as LoRA at lr·√r on a real pretrained model? Held-out loss of both, and of
DoRA.

    python lessons/real_model.py --ckpt smollm2-135m                all runs: 200 steps each on a
                                                                    CPU, one epoch each on a GPU
    python lessons/real_model.py --ckpt smollm2-135m --minutes 30   as many as fit
    python lessons/real_model.py --ckpt smollm2-135m --dry-run      a list of them, in their order

Under AdamW the first update of lora_B is ±lr whatever the scale, so RoRA (α/√r) at rank r begins
like LoRA (α/r) at lr·√r. At each rank RoRA therefore runs at 2e-4, LoRA and DoRA at 2e-4 and at
2e-4·√r; then all of them at one half, two and four times their larger rate, to see where each is
best. The records are the paper's, as many as can be had (BoolQ, OpenBookQA, both ARCs): $RORA_DATA
names their folder. What counts is the loss on held-out records: a model of 135M parameters answers
the questions at chance.

The runs that tell most come first. Stopped, or out of minutes, the same command goes on with the
next run; a run that was cut short begins again.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from plot import LOOK, finish, pyplot, save, smooth
from rows import HERE, METHODS, NAMES, ROOT, append, checkpoint_digest, line, read

sys.path.insert(0, str(ROOT))
import torch

import fast
import rora
from data import encode_records, load_examples, split_validation
from llama import load_llama
from plumbing import run_folder as runs
from plumbing.finding import find_tokenizer
from plumbing.flags import DTYPES, exit_code, find_checkpoint, find_device, find_dtype

LR = 2e-4
ALPHA = 64
DROPOUT = 0.05
MAX_LEN = 256
WINDOW = 20  # steps that a curve of training losses is averaged over


def plan(ranks: list[int]) -> list[tuple[str, int, float]]:
    """(method, rank, lr) of every run, those that tell most first."""
    scaled = lambda method, rank: LR * (1 if method == "rora" else math.sqrt(rank))
    jobs = []
    for methods in (["rora", "lora"], ["dora"]):
        for rank in sorted(ranks, reverse=True):
            for method in methods:
                jobs += [(method, rank, LR), (method, rank, scaled(method, rank))]
    for factor in (2, 0.5, 4):
        for rank in sorted(ranks, reverse=True):
            jobs += [(method, rank, factor * scaled(method, rank)) for method in METHODS]
    return list(dict.fromkeys((method, rank, float(f"{lr:.4g}")) for method, rank, lr in jobs))


def condition(row: dict) -> tuple:
    """What must be equal for two runs to be compared."""
    settings = row["settings"]
    same = (row[k] for k in ("base", "records", "dtype", "device"))
    return *same, *(settings[k] for k in ("steps", "batch", "val", "seed"))


def job_of(row: dict) -> tuple[str, int, float]:
    return tuple(row["settings"][key] for key in ("method", "rank", "lr"))


def run(model, records, held_out, settings: dict) -> dict:
    """One row of the results: attach to `model`, train, and look at the held-out records."""
    torch.manual_seed(settings["seed"])
    rora.attach(model, settings["method"], settings["rank"], ALPHA, DROPOUT)
    recipe = rora.Recipe(
        settings["steps"],
        settings["batch"],
        settings["batch"],
        settings["lr"],
        settings["warmup"],
        settings["seed"],
    )
    optimizer, backward = rora.new_optimizer(model, settings["lr"]), rora.backward
    if not fast.Graphs.refusal(model, 0):  # on a GPU so small a model waits for its host
        most = sum(sorted(len(r.ids) for r in records)[-settings["batch"] :])
        backward = fast.Graphs(model, settings["batch"], most, MAX_LEN).backward
    began, losses = time.perf_counter(), []
    for step in rora.train(model, records, recipe, optimizer, backward=backward):
        losses.append(round(step.loss, 4))
        if step.number % 10 == 0:
            seconds = time.perf_counter() - began
            print(f"  {step.number} steps, loss {step.loss:.3f}, {seconds:.0f} s", flush=True)
    val_loss = rora.validation_loss(model, held_out, settings["batch"])
    return {
        "scale": rora.adapter_settings(model).scaling,
        "trainable": sum(p.numel() for p in rora.trainable(model).values()),
        "val_loss": val_loss if math.isfinite(val_loss) else None,
        "loss": losses,
        "seconds": round(time.perf_counter() - began),
    }


# --- what came of it ------------------------------------------------------------------------------


def table(found: list[dict]) -> str:
    last = found[-1]
    s = last["settings"]
    lines = [
        f"{last['ckpt']}: {last['parameters']:,} parameters; {s['steps']} steps of {s['batch']} "
        f"records, warm-up {s['warmup']}; loss per token of {s['val']} held-out records "
        f"{last['before']:.4f} before",
        "",
        line("rank", "method", "s", "lr", "lr·s·√r/α", "last training losses", "held-out loss"),
        "|--:|---|--:|--:|--:|--:|--:|",
    ]
    order = lambda r: (r["settings"]["rank"], METHODS.index(r["settings"]["method"]), job_of(r)[2])
    for row in sorted(found, key=order):
        method, rank, lr = job_of(row)
        rate = lr * row["scale"] * math.sqrt(rank) / ALPHA
        loss = "not finite" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        recent = f"{mean(row['loss'][-WINDOW:]):.4f}"
        cells = (
            rank,
            NAMES[method],
            f"{row['scale']:.3g}",
            f"{lr:.3g}",
            f"{rate:.3g}",
            recent,
            loss,
        )
        lines.append(line(*cells))
    return "\n".join(lines)


def draw(plt, found: list[dict]):
    """Fig. 3 at the largest rank, then held-out loss against the rate, a panel for each rank."""
    ranks = sorted({row["settings"]["rank"] for row in found})
    fig, axes = plt.subplots(
        1,
        1 + len(ranks),
        figsize=(3.4 * (1 + len(ranks)), 4.2),
        layout="constrained",
        squeeze=False,
    )
    first, *others = axes[0]
    for row in found:
        method, rank, lr = job_of(row)
        scaled = float(f"{LR * math.sqrt(rank):.4g}")
        if rank == ranks[-1] and lr in (LR, scaled) and (method, lr) != ("dora", scaled):
            look = LOOK[method] | ({"linestyle": ":"} if lr != LR else {})
            losses = smooth(row["loss"], WINDOW)
            label = NAMES[method] + (" at lr·√r" if lr != LR else "")
            every = max(1, len(losses) // 8)
            first.plot(range(1, len(losses) + 1), losses, markevery=every, label=label, **look)
    first.set(title=f"r = {ranks[-1]}, lr {LR:g}", xlabel="step", ylabel="training loss")
    for ax, rank in zip(others, ranks):
        for method in METHODS:
            points = sorted(
                (job_of(row)[2] * row["scale"] * math.sqrt(rank) / ALPHA, row["val_loss"])
                for row in found
                if job_of(row)[:2] == (method, rank) and row["val_loss"] is not None
            )
            if points:
                ax.plot(*zip(*points), **LOOK[method])
        ax.set(title=f"r = {rank}", xlabel="lr·s·√r/α", xscale="log", ylabel="held-out loss")
        ax.minorticks_off()  # their labels would lie on one another
        low, high = ax.get_xlim()
        ax.set_xticks([x for x in (LR / 8, LR / 2, LR, 2 * LR, 4 * LR) if low < x < high])
        ax.xaxis.set_major_formatter("{x:g}")
    s, last = found[-1]["settings"], found[-1]
    text = (
        f"{last['ckpt']}, {last['parameters']:,} parameters, on {last['device']}; {s['steps']} "
        f"steps of {s['batch']} records, α = {ALPHA}, seed {s['seed']}; held-out loss before: "
        f"{last['before']:.3f}. For RoRA lr·s·√r/α is lr itself, for LoRA and DoRA lr/√r. "
        f"Training loss: mean of {WINDOW} steps."
    )
    finish(fig, text, first)
    return fig


# --- many runs ------------------------------------------------------------------------------------


def make_runs(args, base: dict, todo: list, began: float) -> None:
    """Runs one after another, until none is left or the next would not end in time."""
    device = find_device(args.device)
    examples = load_examples(args.records)
    every, held_out = split_validation(examples, args.val_size)
    tokenizer = find_tokenizer(args.ckpt)
    records, held_out = (encode_records(part, tokenizer, MAX_LEN)[0] for part in (every, held_out))
    dtype = find_dtype(None, args.ckpt, device)
    steps = args.steps or (
        200 if device.type == "cpu" else math.ceil(len(records) / args.batch_size)
    )
    settings = {"steps": steps, "warmup": min(100, steps // 10), "batch": args.batch_size}
    settings |= {"val": args.val_size, "seed": args.seed}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    base = base | {"dtype": dtype, "device": name}
    these = condition(base | {"settings": settings})
    done = {job_of(r) for r in read(args.results) if condition(r) == these}
    todo = [job for job in todo if job not in done]
    print(
        f"{len(done)} runs are done, {len(todo)} to do; {steps} steps each, {dtype} on {device}",
        flush=True,
    )
    before = longest = 0.0
    for i, (method, rank, lr) in enumerate(todo, 1):
        left = args.minutes * 60 - (time.perf_counter() - began)
        if left < longest:
            print(f"{left:.0f} s are left and a run takes {longest:.0f}: the same command goes on")
            return
        start = time.perf_counter()
        model = load_llama(find_checkpoint(args.ckpt), device, DTYPES[dtype])
        facts = {"parameters": sum(p.numel() for p in model.parameters())}
        before = before or rora.validation_loss(model, held_out, args.batch_size)
        facts["before"] = before
        print(f"{i}/{len(todo)} {NAMES[method]} r = {rank} lr {lr:g}", flush=True)
        job = {"method": method, "rank": rank, "lr": lr} | settings
        row = run(model, records, held_out, job)
        append(args.results, base | {"settings": job} | facts | row)
        print(f"  held-out loss {row['val_loss']}, {before:.4f} before", flush=True)
        longest = max(longest, time.perf_counter() - start)


def side_by_side(argv: list[str], jobs: int) -> int:
    """As many processes as asked for, each with its share of the runs and one thread."""
    command = [sys.executable, __file__, *argv, "--jobs", "1", "--share"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([*command, f"{i}/{jobs}"], env=env) for i in range(jobs)]
    try:
        return max(child.wait() for child in children)
    finally:
        for child in children:
            child.terminate()


def main(argv: list[str]) -> int:
    began = time.perf_counter()
    given = Path(os.environ.get("RORA_DATA") or ROOT.parent / "shared" / "data")
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument(
        "--ckpt", default="smollm2-135m", metavar="NAME", help="default: %(default)s"
    )
    parser.add_argument(
        "--records", type=Path, default=given / "train" / "commonsense_mini.json", metavar="FILE"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results/real_model.jsonl", metavar="FILE"
    )
    parser.add_argument("--figures", type=Path, default=HERE / "figures", metavar="DIR")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--steps", type=int, help="default: 200 on a CPU, one epoch on a GPU")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--val-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run that would not end"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, a thread each")
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="only print the runs")
    args = parser.parse_args(argv)
    mine, parts = map(int, args.share.split("/"))
    todo = plan(args.ranks)[mine::parts]
    if args.dry_run:
        print("\n".join(f"{NAMES[method]} r = {rank} lr {lr:g}" for method, rank, lr in todo))
        return 0
    if args.jobs > 1:
        if code := side_by_side(argv, args.jobs):
            return code
    else:
        base = {
            "ckpt": Path(args.ckpt).name,
            "base": checkpoint_digest(find_checkpoint(args.ckpt)),
            "records": runs.sha256(args.records)[:16],
            "torch": torch.__version__,
        }
        make_runs(args, base, todo, began)
    rows = read(args.results)
    if parts > 1 or not rows:
        return 0
    found = [row for row in rows if condition(row) == condition(rows[-1])]
    print(table(found))
    if plt := pyplot("real_model"):
        save(plt, draw(plt, found), args.figures, "real_model")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "real_model"))
