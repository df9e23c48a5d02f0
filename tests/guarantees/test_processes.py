"""More than one process: the same run, shared. Two processes on the CPU stand for two GPUs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_checkpoint, write_records
from helpers import run

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


def as_two(program, *flags: str) -> list[str]:
    """program.main(flags) in two processes with torchrun's variables; returns what each printed.

    Forked from this one, which has imported torch already.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, index) for index in ("0", "1")]
        both = []
        for file in said:
            pid = os.fork()
            if pid == 0:
                try:
                    os.environ.update(meet, RANK=file.name, LOCAL_RANK=file.name)
                    result = run(*flags, program=program)
                    file.write_text(result.out + result.err * (result.code != 0))
                    os._exit(result.code)
                finally:  # an exception must not bring a second pytest to life
                    os._exit(99)
            both.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both]
        out = [file.read_text() for file in said if file.exists()]
    assert codes == [0, 0], out
    return out


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("val_loss")) for line in lines]


def test_two_processes_make_the_run_of_one_and_the_second_is_silent(home, tmp_path):
    assert rora.main(train_flags(home, tmp_path / "one")) == 0
    first, second = as_two(rora, *train_flags(home, tmp_path / "two"))
    assert "trainable" in first
    assert second == ""
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=1e-6)


def test_two_processes_give_the_scores_of_one_and_ask_each_question_once(home, tmp_path):
    command = ["--ckpt", str(home / "toy"), "--data", str(home / "tests"), "--batch-size", "2"]
    assert judge.main([*command, "--out", str(tmp_path / "one")]) == 0
    as_two(judge, *command, "--out", str(tmp_path / "two"))
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
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    as_two(rora, *train_flags(home, whole, dropout="0.2"))
    shutil.copytree(whole, cut)
    runs.discard(cut / "checkpoints/step-000008")  # as if it had been killed after step 6
    run_json = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(run_json | {"finished": False}))
    assert rora.main(["--resume", str(cut)]) == 2
    assert "trained by 2 processes, this is 1" in capsys.readouterr().err
    as_two(rora, "--resume", str(cut))
    assert losses(cut) == losses(whole)
    for file in ("adapter_model.safetensors", "checkpoints/step-000008/adapter_model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_under_torchrun_when_one_process_dies_the_others_end_too_and_say_so(home, tmp_path):
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = train_flags(home, folder, steps="100000")
    process = subprocess.Popen(
        [*torchrun, "--nproc_per_node=2", str(ROOT / "rora.py"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
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
