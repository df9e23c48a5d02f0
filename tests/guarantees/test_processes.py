"""More than one process: the same run, shared. Two processes on the CPU stand for two GPUs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_checkpoint, write_records

import eval as judge
import rora
from plumbing import run_folder as runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoint(folder / "toy")
    write_records(folder / "train.json", 40)
    write_records(folder / "tests/boolq.json", 11)
    return folder


def train_flags(home, out, *more):
    return [
        "--ckpt",
        str(home / "toy"),
        "--data",
        str(home / "train.json"),
        "--rank",
        "4",
        "--lr",
        "1e-2",
        "--warmup",
        "2",
        "--dropout",
        "0",
        "--batch-size",
        "7",
        "--micro-batch-size",
        "2",
        "--val-size",
        "5",
        "--max-steps",
        "8",
        "--save-every",
        "3",
        "--eval-every",
        "4",
        "--out",
        str(out),
        *more,
    ]


def torchrun(script, *flags, processes=2):
    """The command, as a process that has been started."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        str(ROOT / script),
        *flags,
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err
    return out


def losses(run):
    return [
        row.get("loss", row.get("val_loss"))
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


def test_two_processes_make_the_run_and_the_scores_of_one(home, tmp_path):
    assert rora.main(train_flags(home, tmp_path / "one")) == 0
    said = finish(torchrun("rora.py", *train_flags(home, tmp_path / "two")))
    assert said.count("trainable") == 1  # the second process is silent
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=1e-6)

    for name in ("one", "two"):
        flags = [
            str(tmp_path / "one"),
            "--data",
            str(home / "tests"),
            "--batch-size",
            "2",
            "--out",
            str(tmp_path / f"eval-{name}"),
        ]
        assert (
            judge.main(flags) == 0
            if name == "one"
            else finish(torchrun("eval.py", *flags)) is not None
        )
    one, two = (
        json.loads((tmp_path / f"eval-{name}/results.json").read_text()) for name in ("one", "two")
    )
    assert one["tasks"] == two["tasks"]
    numbers = [
        json.loads(line)["number"]
        for line in (tmp_path / "eval-two/boolq.jsonl").read_text().splitlines()
    ]
    assert sorted(numbers) == list(range(1, 12))  # each question once


def test_a_shared_run_resumes_exactly_and_only_with_as_many_processes(home, tmp_path, capsys):
    flags = ("--dropout", "0.2")
    finish(torchrun("rora.py", *train_flags(home, tmp_path / "whole", *flags)))
    finish(torchrun("rora.py", *train_flags(home, tmp_path / "cut", *flags)))
    run = tmp_path / "cut"
    runs.discard(run / "checkpoints/step-000008")  # as if it had been killed after step 6
    run_json = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(run_json | {"finished": False}))
    assert rora.main(["--resume", str(run)]) == 2
    assert "trained by 2 processes, this is 1" in capsys.readouterr().err
    finish(torchrun("rora.py", "--resume", str(run)))
    assert losses(run) == losses(tmp_path / "whole")
    assert (run / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter_model.safetensors"
    ).read_bytes()


def test_when_one_process_dies_the_others_end_too_and_say_so(home, tmp_path):
    run = tmp_path / "run"
    process = torchrun("rora.py", *[f if f != "8" else "100000" for f in train_flags(home, run)])
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and ("lost another process" in err or "Signal 9" in err)
