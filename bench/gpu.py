"""This project beside transformers + PEFT on one GPU, at the paper's sizes: python bench/gpu.py [--shapes llama-7b ...]

Random weights, made on the device; real records and questions, as in bench/cpu.py. A model fills the card, so the two
sides take turns as whole processes. Writes results-gpu-<device>.json and .md. This has not been run yet: no GPU was at hand.
"""

import argparse
import json
import tempfile
import time
from statistics import median

from turns import HERE, machine, peak_mb, rates, ratios, slope, spread, table, take_turns

VARIANTS = [("lora", 0.0), ("rora", 0.05), ("dora", 0.0), ("dora", 0.05)]
SETTINGS = {
    "ours": {"job": "ours train", "recompute": "auto"},
    "PEFT": {"job": "peft train"},
    "PEFT, autocast": {"job": "peft train", "autocast": True},
    "PEFT, autocast, checkpointing": {"job": "peft train", "autocast": True, "recompute": "all"},
    "ours, --compile": {"job": "ours train", "recompute": "auto", "compile": True},
}


def attempt(specs: dict[str, dict], turns: list[dict], warmup: int) -> dict:
    """As take_turns, one process after the other; {"error": ...} for what does not fit: that, too, is a result."""
    done = {}
    for name, spec in specs.items():
        try:
            done |= take_turns({name: spec}, turns, warmup)
        except RuntimeError as e:
            done[name] = {
                "spec": spec,
                "error": "out of memory" if "out of memory" in str(e) else str(e).splitlines()[-1],
            }
    return done


def measure(shapes: list[str], ranks: list[int], device: str, answers: dict) -> dict:
    turns = [{"round": i, "records": 16} for i in range(13)]  # three to warm up, or to compile
    product = {"job": "product", "device": device, "n": 8192 if device == "cuda" else 256}
    results = {"product": take_turns({"square": product}, [{}] * 6), "training": {}, "answers": {}}
    for shape in shapes:
        base = {"shape": shape, "device": device}
        for rank in ranks:
            for method, dropout in VARIANTS:
                specs = {
                    name: {**base, "method": method, "rank": rank, "dropout": dropout, **s}
                    for name, s in SETTINGS.items()
                }
                results["training"][f"{shape} {method} r={rank} p={dropout:g}"] = attempt(
                    specs, turns, 3
                )
        results["answers"][shape] = attempt(
            {
                "ours": {**base, **answers, "job": "ours answer"},
                "generate": {**base, **answers, "job": "peft answer"},
                "generate, static cache": {**base, **answers, "job": "peft answer", "static": True},
            },
            [{}] * 3,
            1,
        )
    first = {"shape": shapes[0], "device": device}
    return results | {
        "growth": growth(
            first | {"job": "ours train", "method": "rora", "rank": ranks[-1], "dropout": 0.0}
        ),
        "loading": loading(first),
    }


def growth(spec: dict) -> dict:
    """Our step without recomputation, in more and more records and of more and more layers."""
    records, layers = (4, 8, 16), (2, 4, 8, 16)
    turn = lambda n: [{"round": i, "records": n} for i in range(7)]
    return {
        "records": {str(n): attempt({"ours": spec}, turn(n), 3)["ours"] for n in records},
        "layers": {
            str(n): attempt({"ours": spec | {"layers": n}}, turn(16), 3)["ours"] for n in layers
        },
    }


def loading(spec: dict) -> dict:
    """A checkpoint in fp16, written and so in the page cache, to the device; the host's own peak is the process's, not the device's."""
    with tempfile.TemporaryDirectory() as folder:
        spec = spec | {"folder": folder, "dtype": "float16"}
        attempt({"writing": spec | {"job": "write"}}, [{}], 0)
        return attempt(
            {"ours": spec | {"job": "ours load"}, "from_pretrained": spec | {"job": "peft load"}},
            [{}],
            0,
        )


def report(results: dict) -> str:
    m, product = results["machine"], results["product"]["square"]
    rate = median(rates(product, "flops"))

    def row(group: str, name: str, r: dict, what: str) -> list:
        if "error" in r:
            return [group, name, r["error"], "–", "–", "–"]
        ours = results["training" if what == "tokens" else "answers"][group]["ours"]
        share = (
            f"{400 * r['ready']['linear_weights'] * median(rates(r, 'tokens')) / rate:.0f}%"
            if what == "tokens"
            else "–"
        )
        ratio = f"{median(ratios(ours, r, what)):.2f}" if "error" not in ours else "–"
        return [group, name, spread(rates(r, what)), ratio, share, f"{peak_mb(r) / 1000:.1f}"]

    parts = [
        f"""# Beside transformers + PEFT, on {product["ready"]["device"]}

{rate / 1e12:,.0f} TFLOP/s in a bf16 product of 8,192². {m["date"]}, commit {m["commit"]}, Python {m["python"]}, torch {m["torch"]}, \
transformers {m["transformers"]}, PEFT {m["peft"]}. Random weights, 16 real records a step; real tokens: padding is not counted. \
Share: 4 FLOPs for each frozen weight that multiplies and each token, of that rate."""
    ]
    for section, what in [("training", "tokens"), ("answers", "questions")]:
        parts.append(
            table(
                ["", "", f"{what}/s", "ours : this", "share", "peak GB"],
                [
                    row(group, name, r, what)
                    for group, sides in results[section].items()
                    for name, r in sides.items()
                ],
            )
        )
    seconds = lambda r: median(t["seconds"] for t in r["turns"])
    tokens = lambda r: sum(t["tokens"] for t in r["turns"]) / len(r["turns"])
    done = {
        what: [(n, r) for n, r in group.items() if "error" not in r]
        for what, group in results["growth"].items()
    }
    points = {
        "tokens": [(tokens(r), seconds(r)) for _, r in done["records"]],
        "layers": [(int(n), seconds(r)) for n, r in done["layers"]],
    }
    parts.append(
        table(
            ["step time with", "log-log slope", "measured: seconds"],
            [
                [what, f"{slope(p):.2f}", ", ".join(f"{x:,.0f}: {y:.3f}" for x, y in p)]
                for what, p in points.items()
                if len(p) > 1
            ],
        )
    )
    parts.append(
        table(
            ["loading", "seconds", "model GB", "host GB over the imports"],
            [
                [
                    name,
                    *(
                        [r["error"], "–", "–"]
                        if "error" in r
                        else [
                            f"{seconds(r):.1f}",
                            f"{r['turns'][0]['model_mb'] / 1000:.1f}",
                            f"{(r['turns'][0]['host_mb'] - r['ready']['host_mb']) / 1000:.2f}",
                        ]
                    ),
                ]
                for name, r in results["loading"].items()
            ],
        )
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["llama-7b", "llama-13b", "llama3-8b"], metavar="NAME"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128], metavar="N")
    parser.add_argument(
        "--device", default="cuda", help="cpu, with --shapes toy, to see that it runs"
    )
    parser.add_argument("--questions", type=int, default=512, help="answered in batches of 256")
    args = parser.parse_args()
    facts, began = machine(), time.time()
    results = measure(
        args.shapes,
        args.ranks,
        args.device,
        {"questions": args.questions, "batch": min(256, args.questions)},
    )
    results["machine"] = facts | {"minutes": round((time.time() - began) / 60, 1)}
    device = results["product"]["square"]["ready"]["device"].lower().replace(" ", "-")
    out = HERE if args.device == "cuda" else HERE.parent / "runs" / "bench-quick"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"results-gpu-{device}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"results-gpu-{device}.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
