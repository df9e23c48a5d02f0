"""This project beside transformers + PEFT on one GPU, at the paper's sizes: python bench/gpu.py [--shapes llama-7b ...]

Random weights, made on the device; real records and questions, as in bench/cpu.py. A model fills the card, so the two
sides take turns as whole processes. Writes results-gpu-<device>.json and .md. This has not been run yet: no GPU was at hand.
"""

import argparse
import json
import time
from statistics import median

from turns import HERE, machine, peak_mb, rates, ratios, spread, table, take_turns

VARIANTS = [("lora", 0.0), ("rora", 0.05), ("dora", 0.0), ("dora", 0.05)]
SETTINGS = {"ours": {"job": "ours train", "recompute": "auto"}, "PEFT": {"job": "peft train"},
            "PEFT, autocast": {"job": "peft train", "autocast": True},
            "PEFT, autocast, checkpointing": {"job": "peft train", "autocast": True, "recompute": "all"},
            "ours, --compile": {"job": "ours train", "recompute": "auto", "compile": True}}


def attempt(specs: dict[str, dict], turns: list[dict], warmup: int) -> dict:
    """As take_turns, one process after the other; {"error": ...} for what does not fit: that, too, is a result."""
    done = {}
    for name, spec in specs.items():
        try:
            done |= take_turns({name: spec}, turns, warmup)
        except RuntimeError as e:
            done[name] = {"spec": spec, "error": "out of memory" if "out of memory" in str(e) else str(e).splitlines()[-1]}
    return done


def measure(shapes: list[str], ranks: list[int], device: str, answers: dict) -> dict:
    turns = [{"round": i, "records": 16} for i in range(13)]  # three to warm up, or to compile
    product = {"job": "product", "device": device, "n": 8192 if device == "cuda" else 256}
    results = {"product": take_turns({"square": product}, [{}] * 6), "training": {}, "answers": {}}
    for shape in shapes:
        base = {"shape": shape, "device": device}
        for rank in ranks:
            for method, dropout in VARIANTS:
                specs = {name: {**base, "method": method, "rank": rank, "dropout": dropout, **s} for name, s in SETTINGS.items()}
                results["training"][f"{shape} {method} r={rank} p={dropout:g}"] = attempt(specs, turns, 3)
        results["answers"][shape] = attempt({
            "ours": {**base, **answers, "job": "ours answer"}, "generate": {**base, **answers, "job": "peft answer"},
            "generate, static cache": {**base, **answers, "job": "peft answer", "static": True}}, [{}] * 3, 1)
    return results


def report(results: dict) -> str:
    m, product = results["machine"], results["product"]["square"]
    rate = median(rates(product, "flops"))

    def row(group: str, name: str, r: dict, what: str) -> list:
        if "error" in r:
            return [group, name, r["error"], "–", "–", "–"]
        ours = results["training" if what == "tokens" else "answers"][group]["ours"]
        share = f"{400 * r['ready']['linear_weights'] * median(rates(r, 'tokens')) / rate:.0f}%" if what == "tokens" else "–"
        ratio = f"{median(ratios(ours, r, what)):.2f}" if "error" not in ours else "–"
        return [group, name, spread(rates(r, what)), ratio, share, f"{peak_mb(r) / 1000:.1f}"]

    parts = [f"""# Beside transformers + PEFT, on {product['ready']['device']}

{rate / 1e12:,.0f} TFLOP/s in a bf16 product of 8,192². {m['date']}, commit {m['commit']}, Python {m['python']}, torch {m['torch']}, \
transformers {m['transformers']}, PEFT {m['peft']}. Random weights, 16 real records a step; real tokens: padding is not counted. \
Share: 4 FLOPs for each frozen weight that multiplies and each token, of that rate."""]
    for section, what in [("training", "tokens"), ("answers", "questions")]:
        parts.append(table(["", "", f"{what}/s", "ours : this", "share", "peak GB"], [
            row(group, name, r, what) for group, sides in results[section].items() for name, r in sides.items()]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-7b", "llama-13b", "llama3-8b"], metavar="NAME")
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 128], metavar="N")
    parser.add_argument("--device", default="cuda", help="cpu, with --shapes toy, to see that it runs")
    parser.add_argument("--questions", type=int, default=512, help="answered in batches of 256")
    args = parser.parse_args()
    facts, began = machine(), time.time()
    results = measure(args.shapes, args.ranks, args.device, {"questions": args.questions, "batch": min(256, args.questions)})
    results["machine"] = facts | {"minutes": round((time.time() - began) / 60, 1)}
    device = results["product"]["square"]["ready"]["device"].lower().replace(" ", "-")
    out = HERE if args.device == "cuda" else HERE.parent / "runs" / "bench-quick"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"results-gpu-{device}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"results-gpu-{device}.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
