"""This project beside transformers + PEFT on a CPU, with real records: python bench/cpu.py [--quick]

Run it where both can be imported (make bench). It writes results-cpu.json, every single measurement, and results-cpu.md,
the tables; --table makes the tables again from the JSON. RORA_DATA names the folder with records and tokenizers.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from turns import HERE, machine, peak_mb, rates, ratios, slope, spread, table, take_turns

VARIANTS = [("lora", 0.0), ("rora", 0.0), ("dora", 0.0), ("dora", 0.05)]
SETTINGS = {  # PEFT's ways to run; the bars compare with the fastest of them
    "PEFT": {}, "PEFT, autocast": {"autocast": True}, "PEFT, checkpointing": {"recompute": "all"}}
BARS = [  # name, key in `values`, at most or at least, bar, stretch
    ("LoRA r=128, tokens/s, ours : PEFT", "lora", ">=", 2.3, 2.5),
    ("DoRA r=128 p=0.05, tokens/s, ours : PEFT (its dropout also reaches W x; ours does not)", "dora", ">=", 3.6, 4.0),
    ("our DoRA step : our LoRA step, p=0", "dora:lora", "<=", 1.15, None),
    ("questions/s, ours : transformers' generate", "answers", ">=", 2.0, None),
    ("step time against tokens, slope", "tokens", "<=", 1.05, None),
    ("step time against layers, slope", "layers", "<=", 1.05, None),
    ("loading: host memory beyond the model, in largest tensors", "load", "<=", 1.5, None)]


def training(method: str, rank: int, dropout: float, shape: str, **more) -> dict:
    return {"shape": shape, "method": method, "rank": rank, "dropout": dropout, **more}


def measure(quick: bool, folder: Path) -> dict:
    """{section: {group: what take_turns says}}, all in a few minutes."""
    shape, ranks, records = ("toy", (8,), 4) if quick else ("small", (128, 32, 8), 16)
    top = ranks[0]
    rounds = lambda n, **turn: [{"round": i, "records": records, **turn} for i in range(2 if quick else n + 1)]
    both = lambda s, **more: {"ours": {"job": "ours train", **s, **more}, "PEFT": {"job": "peft train", **s, **more}}
    sections: dict[str, dict] = {"training": {}, "settings": {}}

    for method, dropout in [("lora", 0.0), ("dora", 0.05)]:
        s = training(method, top, dropout, shape)
        specs = {"ours": {"job": "ours train", **s}, "ours, checkpointing": {"job": "ours train", **s, "recompute": "all"}}
        specs |= {name: {"job": "peft train", **s, **more} for name, more in SETTINGS.items()}
        sections["settings"][f"{method} p={dropout:g}"] = take_turns(specs, rounds(5))
        sections["settings"][f"{method} p={dropout:g}, batches of one length"] = take_turns(both(s), rounds(5, grouped=True))
    for rank in ranks:
        for method, dropout in VARIANTS:
            known = sections["settings"].get(f"{method} p={dropout:g}") if rank == top else None  # measured above
            sections["training"][f"{method} r={rank} p={dropout:g}"] = {n: known[n] for n in ("ours", "PEFT")} if known else take_turns(
                both(training(method, rank, dropout, shape)), rounds(3))
    sections["dora beside lora"] = {"ours": take_turns(
        {f"{m} p={p:g}": {"job": "ours train", **training(m, top, p, shape)} for p in (0.0, 0.05) for m in ("lora", "dora")}, rounds(7))}

    one = training("lora", top, 0.0, shape)
    sections["slopes"] = {
        "tokens": take_turns({"ours": {"job": "ours train", **one}}, [
            {"round": i, "records": n} for i in range(4) for n in ((2, 4) if quick else (4, 8, 16, 32))], warmup=2 if quick else 4),
        "layers": take_turns({str(n): {"job": "ours train", **one, "layers": n} for n in ((1, 2) if quick else (2, 4, 8, 16))}, rounds(3)),
        "rank": take_turns({str(r): {"job": "ours train", **one, "rank": r} for r in ((4, 8) if quick else (8, 32, 128, 256))}, rounds(3))}

    base = {"shape": shape, "folder": str(folder / "merged")}
    take_turns({"writing": {"job": "write", **base, "rank": top, "dtype": "bfloat16"}}, [{}])
    asked = {**base, "questions": 8 if quick else 64, "batch": 4 if quick else 32}
    sections["answers"] = {"greedy": take_turns({
        "ours": {"job": "ours answer", **asked}, "generate": {"job": "peft answer", **asked},
        "generate, static cache": {"job": "peft answer", **asked, "static": True}}, rounds(4))}

    wide = {"shape": "toy" if quick else "wide", "folder": str(folder / "wide")}
    take_turns({"writing": {"job": "write", **wide, "dtype": "float16"}}, [{}])
    loads = [take_turns({"ours": {"job": "ours load", **wide}, "from_pretrained": {"job": "peft load", **wide}}, [{}], 0, together=False)
             for _ in range(1 if quick else 3)]  # a new process for each, or a peak would hide the next
    sections["loading"] = {"fp16": {name: {**r, "turns": [load[name]["turns"][0] for load in loads]} for name, r in loads[0].items()}}
    product = take_turns({"matmul": {"job": "matmul", "n": 256 if quick else 2048, "repeat": 4}}, [{}] * 6)
    return {**sections, "product": {"bf16": product}}


# --- tables ----------------------------------------------------------------------------------------


def fastest(group: dict, prefix: str, what: str) -> dict:
    return max((r for name, r in group.items() if name.startswith(prefix)), key=lambda r: median(rates(r, what)))


def memory(r: dict) -> str:
    return f"{peak_mb(r):,.0f} ({peak_mb(r) - r['ready']['built_mb']:+,.0f})"


def beyond_model(r: dict) -> list[float]:
    return [t["peak_mb"] - r["ready"]["built_mb"] - t["model_mb"] for t in r["turns"]]


def seconds(r: dict) -> list[float]:
    return [t["seconds"] for t in r["turns"]]


def points(results: dict, section: str) -> list[tuple[float, float]]:
    """(what grows, seconds a step). Batches of as many records differ in tokens: the median of their seconds a token counts."""
    if section != "tokens":
        return [(int(n), median(seconds(r))) for n, r in results["slopes"][section].items()]
    turns = results["slopes"]["tokens"]["ours"]["turns"]
    sizes = [[t for t in turns if t["records"] == n] for n in sorted({t["records"] for t in turns})]
    mean = lambda size: round(sum(t["tokens"] for t in size) / len(size))
    return [(mean(size), mean(size) * median(t["seconds"] / t["tokens"] for t in size)) for size in sizes]


def bar_values(results: dict) -> dict[str, float]:
    settings, answers, load = results["settings"], results["answers"]["greedy"], results["loading"]["fp16"]["ours"]
    steps = results["dora beside lora"]["ours"]
    against_fastest = lambda group: median(ratios(group["ours"], fastest(group, "PEFT", "tokens"), "tokens"))
    return {
        "lora": against_fastest(settings["lora p=0"]), "dora": against_fastest(settings["dora p=0.05"]),
        "dora:lora": median(ratios(steps["lora p=0"], steps["dora p=0"], "tokens")),
        "answers": median(ratios(answers["ours"], fastest(answers, "generate", "questions"), "questions")),
        "tokens": slope(points(results, "tokens")), "layers": slope(points(results, "layers")),
        "load": median(beyond_model(load)) / load["turns"][0]["largest_tensor_mb"]}


def report(results: dict) -> str:
    m, values, settings = results["machine"], bar_values(results), results["settings"]
    steps, answers = results["dora beside lora"]["ours"], results["answers"]["greedy"]
    ready = settings["lora p=0"]["ours"]["ready"]
    product = median(rates(results["product"]["bf16"]["matmul"], "flops"))
    share = lambda r: f"{400 * ready['linear_weights'] * median(rates(r, 'tokens')) / product:.0f}%"
    padding = lambda r: sum(t.get("padded", t["tokens"]) for t in r["turns"]) / sum(t["tokens"] for t in r["turns"])

    bars = [[what, f"{values[key]:.2f}", f"{'≥' if sign == '>=' else '≤'} {bar}", "yes" if reached(values[key], sign, bar) else "**no**",
             f"{stretch}: {'yes' if reached(values[key], sign, stretch) else 'no'}" if stretch else "–"]
            for what, key, sign, bar, stretch in BARS]
    training = [[name, *(spread(rates(g[side], "tokens")) for side in ("ours", "PEFT")), spread(ratios(g["ours"], g["PEFT"], "tokens"), 2),
                 share(g["ours"]), memory(g["ours"]), memory(g["PEFT"])] for name, g in results["training"].items()]
    ways = [[name, way, spread(rates(r, "tokens")), spread(ratios(g["ours"], r, "tokens"), 2), f"{padding(r):.2f}", memory(r)]
            for name, g in settings.items() for way, r in g.items()]
    dora = [[name, spread(seconds(r), 3), spread(ratios(steps["lora p=0"], r, "tokens"), 2)] for name, r in steps.items()]
    answered = [[name, spread(rates(r, "questions"), 1), spread(ratios(answers["ours"], r, "questions"), 2), memory(r)]
                for name, r in answers.items()]
    loaded = [[name, spread(seconds(r), 2), *(f"{r['turns'][0][k]:,.0f}" for k in ("model_mb", "largest_tensor_mb")), spread(beyond_model(r))]
              for name, r in results["loading"]["fp16"].items()]
    grown = [[what, f"{slope(points(results, what)):.2f}", ", ".join(f"{x:,}: {y:.2f}" for x, y in points(results, what))]
             for what in ("tokens", "layers", "rank")]
    MEMORY = "peak MB (over the built model)"
    return f"""# Beside transformers + PEFT, on a CPU

{m['cpu']}, {m['cores']} cores ({ready['threads']} threads), bf16 instructions: {'yes' if m['bf16'] else 'no'}; \
{product / 1e9:,.0f} GFLOP/s in a bf16 product of 2,048². {m['date']}, {m['minutes']} minutes, load {m['load_before']} before the start; commit \
{m['commit']}, Python {m['python']}, torch {m['torch']}, transformers {m['transformers']}, PEFT {m['peft']}.

LLaMA of width 512, 8 layers, vocabulary 32,000, random weights; 16 real records a step, cut at 256 tokens; bf16 base, fp32 adapters on \
q, k, v, up, down; fused AdamW, clipping. Tokens are real tokens: padding is not counted. Every measurement has a process of its own; the \
processes take turns, step by step, with the same records. Median (least–most).

## Bars

{table(["", "measured", "bar", "met", "stretch"], bars)}

Against PEFT's and transformers' fastest setting below, batch by batch.

## Training, tokens/s

{table(["", "ours", "PEFT", "ours : PEFT", "our share", "our " + MEMORY, "PEFT's"], training)}

Share: 4 FLOPs for each frozen weight that multiplies and each token, adapters and attention not counted, of the rate above.

## Ways to run, highest rank

{table(["", "", "tokens/s", "ours : this", "tokens computed : real", MEMORY], ways)}

Autocast is what `Trainer(bf16=True)` adds: adapters multiply in bf16. Checkpointing: every block. Batches of one length: `group_by_length`.

## DoRA beside LoRA, ours

{table(["", "seconds a step", "to LoRA p=0"], dora)}

## Answering

Real test questions, longest first, in batches; greedy, 32 new tokens each; the same merged bf16 weights from one folder.

{table(["", "questions/s", "ours : this", MEMORY], answered)}

## Loading

fp16 on disk (in the page cache), bf16 in memory; host memory beyond the imports and the model itself.

{table(["", "seconds", "model MB", "largest tensor MB", "beyond the model MB"], loaded)}

## How our step grows

{table(["with", "log-log slope", "measured: seconds"], grown)}
"""


def reached(value: float, sign: str, bar: float) -> bool:
    return value >= bar if sign == ">=" else value <= bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that all of it runs; into runs/bench-quick")
    parser.add_argument("--table", action="store_true", help="only make the tables again from results-cpu.json")
    args = parser.parse_args()
    out = HERE.parent / "runs" / "bench-quick" if args.quick else HERE
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results-cpu.json"
    if not args.table:
        facts, began = machine(), time.time()
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
            results = measure(args.quick, Path(folder))
        results["machine"] = facts | {"minutes": round((time.time() - began) / 60, 1)}
        file.write_text(json.dumps(results, indent=1) + "\n")
    text = report(json.loads(file.read_text()))
    (out / "results-cpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
