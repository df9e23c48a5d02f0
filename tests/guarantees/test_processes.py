"""More than one process: the same run, shared. Two processes on the CPU stand for two GPUs."""

import json
import os
import shutil
import signal
import socket
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
    folder = tmp_path_factory.mktemp("processes")
    write_checkpoint(folder / "toy")
    write_records(folder / "train.json", 40)
    write_records(folder / "tests/boolq.json", 11)
    return folder


def train_flags(home, out, *, dropout="0", steps="8"):
    flags = (
        "--rank 4 --lr 1e-2 --warmup 2 --batch-size 7 --micro-batch-size 2 --val-size 5 "
        f"--save-every 3 --eval-every 4 --dropout {dropout} --max-steps {steps}"
    )
    files = ["--ckpt", str(home / "toy"), "--data", str(home / "train.json"), "--out", str(out)]
    return [*files, *flags.split()]


def start(command: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def as_two(script: str, *flags: str) -> list[str]:
    """Run the program as two processes, as torchrun starts them; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [str(ROOT / script), *flags]
    both = [start(command, RANK=i, LOCAL_RANK=i, **meet) for i in ("0", "1")]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return [out for out, _ in said]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def test_two_processes_make_the_run_of_one_and_the_second_is_silent(home, tmp_path):
    assert rora.main(train_flags(home, tmp_path / "one")) == 0
    first, second = as_two("rora.py", *train_flags(home, tmp_path / "two"))
    assert "trainable" in first
    assert second == ""
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=1e-6)


def test_two_processes_give_the_scores_of_one_and_ask_each_question_once(home, tmp_path):
    command = ["--ckpt", str(home / "toy"), "--data", str(home / "tests"), "--batch-size", "2"]
    assert judge.main([*command, "--out", str(tmp_path / "one")]) == 0
    as_two("eval.py", *command, "--out", str(tmp_path / "two"))
    one, two = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    )
    assert one["tasks"] == two["tasks"]
    of_one, of_two = (
        sorted((tmp_path / name / "boolq.jsonl").read_text().splitlines())
        for name in ("one", "two")
    )
    assert of_one == of_two
    assert len(of_two) == 11


def test_a_shared_run_resumes_exactly_and_only_with_as_many_processes(home, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "cut"
    as_two("rora.py", *train_flags(home, whole, dropout="0.2"))
    shutil.copytree(whole, run)
    runs.discard(run / "checkpoints/step-000008")  # as if it had been killed after step 6
    run_json = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(run_json | {"finished": False}))
    assert rora.main(["--resume", str(run)]) == 2
    assert "trained by 2 processes, this is 1" in capsys.readouterr().err
    as_two("rora.py", "--resume", str(run))
    assert losses(run) == losses(whole)
    for file in ("adapter_model.safetensors", "checkpoints/step-000008/adapter_model.safetensors"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()


def test_under_torchrun_when_one_process_dies_the_others_end_too_and_say_so(home, tmp_path):
    run = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = train_flags(home, run, steps="100000")
    process = start([*torchrun, str(ROOT / "rora.py"), *flags])
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "lost another process" in err or "Signal 9" in err
