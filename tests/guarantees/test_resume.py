"""A run that was stopped and resumed is the run that was not stopped; what must not be is not."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    ROOT,
    at_step,
    flags,
    in_child,
    interrupt,
    make_world,
    outcome,
    refused,
    rora,
    rows,
    run,
    score,
    tree,
)
from safetensors.torch import load_file

from plumbing import jobs
from plumbing import run_folder as runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Twelve steps without an interruption: dropout, micro-batches of 3 in batches of 4, two epochs
    of 6 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder)).code == 0
    return folder


# --- equal, bit for bit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", [1, 3, 5, 6, 8, 11]
)  # 1: lr was 0; 3: validation; 5: a save; 6: the end of an epoch
def test_a_run_resumed_at_any_step_is_the_run_that_never_stopped(world, whole, tmp_path, step):
    stopped = interrupt(step, *flags(world, tmp_path / "run"))
    assert (
        stopped.code == 130
        and f"saved {tmp_path}/run/checkpoints/step-{step:06}" in stopped.out
        and "--resume" in stopped.out
    )
    assert run("--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_run_may_be_stopped_again_and_again(world, whole, tmp_path):
    assert interrupt(2, *flags(world, tmp_path / "run"), with_signal=signal.SIGTERM).code == 143
    for step in (4, 5, 9):
        assert interrupt(step, "--resume", tmp_path / "run").code == 130
    assert run("--resume", tmp_path / "run").code == 0 and outcome(tmp_path / "run") == outcome(
        whole
    )


@pytest.mark.parametrize("method", rora.METHODS)
def test_every_method_resumes_bit_for_bit(world, tmp_path, method):
    alpha = {} if rora.METHODS[method].layer.scale else {"alpha": None}
    settings = (
        {"method": method, "max_steps": 5, "epochs": None}
        | alpha
        | ({"dropout": None} if method == "prefix" else {})
    )
    assert run(*flags(world, tmp_path / "whole", **settings)).code == 0
    assert interrupt(3, *flags(world, tmp_path / "cut", **settings)).code == 130
    assert run("--resume", tmp_path / "cut").code == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_after_a_crash_the_lost_steps_are_made_again_once(world, whole, tmp_path):
    class Crash(BaseException):
        pass

    def crash():
        raise Crash

    with at_step(8, crash), pytest.raises(Crash):
        run(*flags(world, tmp_path / "run"))
    assert (
        rows(tmp_path / "run")[-1]["step"] == 8
        and runs.checkpoints(tmp_path / "run")[0].name == "step-000005"
    )
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # and the last line was cut short
    assert run("--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)
    assert [r["step"] for r in rows(tmp_path / "run") if "loss" in r] == list(range(1, 13))


def test_the_scores_of_a_resumed_run_are_the_scores_of_the_whole_one(world, whole, tmp_path):
    interrupt(7, *flags(world, tmp_path / "run"))
    run("--resume", tmp_path / "run")
    for folder in (whole, tmp_path / "run"):
        assert score(folder, "--data", world.tests).code == 0
    for name in ("results.json", "boolq.jsonl", "piqa.jsonl"):
        assert (whole / "eval" / name).read_bytes() == (
            tmp_path / "run" / "eval" / name
        ).read_bytes()


# --- what is refused ------------------------------------------------------------------------------


def test_a_changed_setting_is_refused_by_name_and_nothing_is_touched(world, tmp_path):
    interrupt(2, *flags(world, tmp_path / "run"))
    before = tree(tmp_path)
    result = run(
        "--resume",
        tmp_path / "run",
        "--lr",
        "3e-2",
        "--rank",
        8,
        "--targets",
        "q_proj",
        "--micro-batch-size",
        1,
    )
    refused(result, 2, "--rank 4 (now 8)", "--lr 0.01 (now 0.03)", "--targets")
    assert "micro" not in result.err and tree(tmp_path) == before


def test_other_records_another_tokenizer_or_another_base_are_not_resumed_with(world, tmp_path):
    copy = make_world(tmp_path / "world")
    interrupt(2, *flags(copy, tmp_path / "run"))
    records = json.loads(copy.data.read_text())
    for path, content in [
        (copy.data, json.dumps(records[::-1]).encode()),
        (copy.base / "tokenizer.model", None),
        (
            copy.base / "config.json",
            (copy.base / "config.json").read_bytes().replace(b"10000.0", b"20000.0"),
        ),
    ]:
        original = path.read_bytes()
        path.write_bytes(content or original + b"\x1a\x00")
        refused(run("--resume", tmp_path / "run"), 3, "is not what", "put the original back")
        path.write_bytes(original)
    assert run("--resume", tmp_path / "run").code == 0


def test_memory_flags_may_change_on_resume(world, tmp_path):
    interrupt(2, *flags(world, tmp_path / "run"))
    assert (
        run(
            "--resume", tmp_path / "run", "--micro-batch-size", 1, "--checkpoint-blocks", "all"
        ).code
        == 0
    )
    written = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (written["micro_batch_size"], written["checkpoint_blocks"]) == (1, "all")


def test_targets_may_be_typed_again_with_commas(world, tmp_path):
    targets = ("--targets", "q_proj,v_proj")
    assert interrupt(2, *flags(world, tmp_path / "run"), *targets).code == 130
    assert run("--resume", tmp_path / "run", *targets).code == 0


def test_nothing_to_resume_is_not_a_new_start(world, tmp_path):
    refused(run("--resume", tmp_path / "nowhere"), 2, "not a run folder")
    with pytest.raises(ZeroDivisionError), at_step(1, lambda: 1 / 0):
        run(*flags(world, tmp_path / "run"))
    before = tree(tmp_path)
    refused(run("--resume", tmp_path / "run"), 2, "no checkpoint yet", "--overwrite")
    assert tree(tmp_path) == before


def test_an_existing_run_is_neither_continued_nor_overwritten_by_default(world, whole, tmp_path):
    before = tree(whole)
    refused(run(*flags(world, whole)), 2, "exists", "--resume", "--overwrite", "--out")
    (tmp_path / "notes").write_text("mine")
    refused(run(*flags(world, tmp_path), "--overwrite"), 2, "is not a run")
    assert tree(whole) == before and (tmp_path / "notes").read_text() == "mine"


def test_overwrite_starts_anew_and_leaves_nothing_of_the_old_run(world, whole, tmp_path):
    assert (
        run(*flags(world, tmp_path / "run", seed=7, max_steps=30, epochs=None, save_every=3)).code
        == 0
    )
    score(tmp_path / "run", "--data", world.tests)
    assert run(*flags(world, tmp_path / "run"), "--overwrite").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)
    assert not (tmp_path / "run" / "eval").exists() and len(runs.checkpoints(tmp_path / "run")) == 2


def test_a_run_that_appeared_while_the_model_was_read_is_not_wiped(world, tmp_path, monkeypatch):
    prepare = jobs.prepare

    def slow(*args):
        monkeypatch.setattr(jobs, "prepare", prepare)
        assert run(*flags(world, tmp_path / "run", seed=3)).code == 0  # another process, quicker
        return prepare(*args)

    monkeypatch.setattr(jobs, "prepare", slow)
    refused(run(*flags(world, tmp_path / "run")), 2, "exists")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 3


def test_two_processes_in_one_folder_are_refused_and_the_lock_dies_with_its_process(
    world, tmp_path
):
    interrupt(2, *flags(world, tmp_path / "run"))
    hold = (
        "import sys, time; from pathlib import Path; from plumbing import run_folder as runs\n"
        "with runs.lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    before = tree(tmp_path)
    refused(run("--resume", tmp_path / "run"), 2, "in use by another process")
    refused(run(*flags(world, tmp_path / "run"), "--overwrite"), 2, "in use by another process")
    assert tree(tmp_path) == before
    other.kill()
    other.wait()
    other.stdout.close()
    assert run("--resume", tmp_path / "run").code == 0


def test_resuming_a_finished_run_says_so_and_changes_nothing(world, whole):
    before = tree(whole)
    result = run("--resume", whole)
    assert (
        result.code == 0
        and "is finished" in result.out
        and result.err == ""
        and tree(whole) == before
    )


# --- signals --------------------------------------------------------------------------------------


def test_the_same_signal_again_ends_the_process_at_once(world, tmp_path):
    def impatient():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def work():
        with at_step(3, impatient):
            return run(*flags(world, tmp_path / "run")).code

    assert in_child(work) == 130 and runs.checkpoints(tmp_path / "run") == []


def test_a_signal_between_deciding_to_save_and_stopping_waits_for_the_next_step(
    world, whole, tmp_path, monkeypatch
):
    """Asked twice, `stop` could answer no to "save?" and yes to "stop?": the step would be lost."""

    class Late(list):
        asked = 0

        def __bool__(self):
            self.asked += 1
            if self.asked == 2:  # after step 1, between the two questions
                self.append(130)
            return len(self) > 0

    stop = Late()
    monkeypatch.setattr(
        runs,
        "stop_signals",
        lambda **_: __import__("contextlib").contextmanager(lambda: (yield stop))(),
    )
    assert run(*flags(world, tmp_path / "run")).code == 130 and runs.checkpoints(tmp_path / "run")
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run").code == 0 and outcome(tmp_path / "run") == outcome(
        whole
    )


# --- what a result does not depend on -------------------------------------------------------------


def test_training_does_not_depend_on_micro_batches_or_on_recomputed_blocks(world, tmp_path):
    plain = {"dropout": 0, "max_steps": 4, "epochs": None}
    for name, change in [
        ("a", {"micro_batch_size": 4}),
        ("b", {"micro_batch_size": 1}),
        ("c", {"micro_batch_size": 4, "checkpoint_blocks": 1}),
        ("d", {"micro_batch_size": 4, "checkpoint_blocks": "all"}),
    ]:
        assert run(*flags(world, tmp_path / name, **plain, **change)).code == 0
    a, b, c, d = (rows(tmp_path / name) for name in "abcd")
    assert a == c == d
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and all(y[k] == pytest.approx(x[k], rel=1e-5) for k in x)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert all(
        torch.allclose(weights[0][k], weights[1][k], rtol=1e-3, atol=1e-5) for k in weights[0]
    )
