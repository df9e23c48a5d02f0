"""Kill the process, fill the disk, damage a file, poison a batch: what was saved stays whole.

`make faults` does the same at every instant of a run, and to real processes at random times.
"""

import errno
import os
import shutil
import signal

import pytest
import torch
from helpers import (
    at_step,
    flags,
    go_on,
    instants,
    interrupt,
    killed,
    make_world,
    outcome,
    refused,
    rora,
    run,
    score,
    tree,
    watched_disk,
)
from safetensors.torch import load_file

from data import epoch_order
from plumbing import jobs, scoring, training
from plumbing import run_folder as runs

SHORT = {
    "max_steps": 4,
    "epochs": None,
    "save_every": 1,
    "eval_every": 2,
}  # four saves, two validations


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 14)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


@pytest.fixture(scope="module")
def half(world, tmp_path_factory):
    """The same run, stopped after two steps and two saves."""
    folder = tmp_path_factory.mktemp("half") / "run"
    assert interrupt(2, *flags(world, folder, **SHORT)).code == 130
    return folder


def third_save(log: list[tuple[str, str]], validations: int = 0) -> range:
    """The instants of the save after step 3, the first that forgets an old checkpoint."""
    rows = [
        i
        for i, (operation, path) in enumerate(log)
        if operation == "write" and path.endswith("metrics.jsonl")
    ]
    return range(rows[validations], rows[validations + 1] + 1)


# --- the order of a save --------------------------------------------------------------------------


def test_a_save_is_written_synced_renamed_synced_and_only_then_is_an_old_one_forgotten(
    world, tmp_path
):
    log = instants(*flags(world, tmp_path / "run", **SHORT))
    save = [
        (operation, os.path.relpath(path, tmp_path / "run" / "checkpoints"))
        for operation, path in log[third_save(log).start :]
    ]
    temporary = f".tmp-step-000003-{os.getpid()}"
    written = [
        path for operation, path in save if operation == "torn" and path.startswith(temporary)
    ][:5]
    assert written[-1] == f"{temporary}/MANIFEST.json" and len(written) == 5
    renamed = next(
        i for i, (operation, path) in enumerate(save) if (operation, path) == ("rename", temporary)
    )
    for path in [*written, temporary]:  # every file, and the folder that lists them
        last_write = max(
            i
            for i, (operation, p) in enumerate(save)
            if p == path and operation in ("torn", "mkdir")
        )
        assert last_write < save.index(("fsync", path)) < renamed
    assert save[renamed + 1] == ("fsync", ".")  # the parent, which holds the new name
    assert save[renamed + 2] == (
        "rename",
        "step-000001",
    )  # the old one loses its name at once, then its files
    assert (
        save[0][0] == "write"
        and ("fsync", "../metrics.jsonl") in save[: save.index(("mkdir", temporary))]
    )


def test_saved_is_said_only_when_it_is(world, tmp_path, monkeypatch):
    """At every instant, each checkpoint that was claimed stands there, and none is claimed
    half-way."""
    claims, seen = [], []
    monkeypatch.setattr(
        training.tqdm, "write", staticmethod(lambda text: claims.append(text.rpartition("/")[2]))
    )
    with watched_disk(
        lambda operation, path: seen.append(
            (claims[-1:], [p.name for p in runs.checkpoints(tmp_path / "run")[:1]])
        )
    ):
        assert run(*flags(world, tmp_path / "run", **SHORT)).code == 0
    assert claims == [f"step-{n:06}" for n in (1, 2, 3, 4)]
    assert all(not claimed or claimed <= listed for claimed, listed in seen)
    assert {(tuple(claimed), tuple(listed)) for claimed, listed in seen} >= {
        ((), ("step-000001",)),
        (("step-000001",), ("step-000002",)),
    }


# --- kill -9 --------------------------------------------------------------------------------------


def test_after_kill_9_at_any_instant_of_a_save_the_newest_checkpoint_is_whole_and_resume_goes_on(
    whole, half, tmp_path
):
    log = instants("--resume", shutil.copytree(half, tmp_path / "log"))
    for n in third_save(log):
        if log[n][0] == "unlink":  # of the forgotten checkpoint, which has lost its name already
            continue
        folder = shutil.copytree(half, tmp_path / str(n))
        assert killed(n, "--resume", folder) == -signal.SIGKILL
        listed = runs.checkpoints(folder)
        assert len(listed) >= 2 and not any(map(runs.damage, listed)), (n, log[n])
        resumed = run("--resume", folder)
        assert resumed.code == 0 and outcome(folder) == outcome(whole), (n, log[n], resumed)
        assert not [p for p in folder.rglob(".tmp-*")], (n, log[n])


def test_after_kill_9_before_the_first_save_the_same_command_starts_again(world, whole, tmp_path):
    command = lambda folder: flags(world, folder, **SHORT)
    log = instants(*command(tmp_path / "log"))
    first = next(i for i, (operation, path) in enumerate(log) if operation == "write")
    for n in range(0, first, 5):
        folder = tmp_path / str(n)
        killed(n, *command(folder))
        result = go_on(folder, *command(folder))
        assert result.code == 0 and outcome(folder) == outcome(whole), (n, log[n], result)


# --- a full disk, a locked one --------------------------------------------------------------------


def test_a_full_disk_at_any_instant_of_a_save_costs_one_line_and_no_checkpoint(
    whole, half, tmp_path
):
    log = instants("--resume", shutil.copytree(half, tmp_path / "log"))
    for n in third_save(log):
        if log[n][0] in ("unlink", "rmdir"):  # giving room back does not need any
            continue
        folder, left = shutil.copytree(half, tmp_path / str(n)), [n]

        def full(operation, path, left=left):
            left[0] -= 1
            if left[0] < 0 and operation not in ("unlink", "rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        with watched_disk(full):
            stopped = run("--resume", folder)
        refused(
            stopped, 1, "No space left on device", "what was saved before is intact", "--resume"
        )
        listed = runs.checkpoints(folder)
        assert len(listed) >= 2 and not any(map(runs.damage, listed)), log[n]
        assert "saved" not in stopped.out or listed[0].name == "step-000003", log[n]
        assert not [p for p in folder.rglob(".tmp-*") if p.is_file()], log[
            n
        ]  # nothing half-written takes up the room
    assert run("--resume", folder).code == 0 and outcome(folder) == outcome(whole)


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(
    world, tmp_path, monkeypatch
):
    interrupt(2, *flags(world, tmp_path / "run", **SHORT))
    before = tree(tmp_path)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode)
    )  # chmod does not stop root
    monkeypatch.setattr(jobs, "load_base", lambda *a: pytest.fail("the model was read"))
    for command in [
        flags(world, tmp_path / "new"),
        ["--resume", tmp_path / "run"],
        flags(world, tmp_path / "train.json" / "run"),
    ]:
        refused(run(*command), 2, "is not writable", "--out")
    refused(run("--merge", tmp_path / "run", "--out", tmp_path / "merged"), 2, "is not writable")
    refused(score(tmp_path / "run", "--data", world.tests), 2, "is not writable")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["file", "file/below", "x" * 300])
def test_an_impossible_output_folder_is_refused(world, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    refused(run(*flags(world, tmp_path / out)), 2, "choose another --out")
    assert tree(tmp_path) == {"file": b"mine"}


# --- a damaged checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, how",
    [
        ("adapter_model.safetensors", "flipped"),
        ("optimizer.safetensors", "cut"),
        ("state.json", "gone"),
        ("MANIFEST.json", "flipped"),
        ("MANIFEST.json", "cut"),
        ("MANIFEST.json", "gone"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    world, whole, tmp_path, file, how
):
    interrupt(3, *flags(world, tmp_path / "run", **SHORT))
    path = tmp_path / "run" / "checkpoints" / "step-000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if how == "gone" else path.write_bytes(
        content if how == "flipped" else content[:-9]
    )
    refused(
        score(path.parent, "--data", world.tests), 3, "step-000003", file if how == "gone" else ""
    )  # named: no other one will do
    result = run("--resume", tmp_path / "run")
    assert (
        result.code == 0
        and "step-000003" in result.err
        and "using the older" in result.err
        and "resuming" in result.out
    )
    assert outcome(tmp_path / "run") == outcome(whole)


def test_a_damaged_checkpoint_does_not_push_an_intact_one_out(world, tmp_path):
    """Three are listed, the newest is damaged: dropping the oldest of the three would leave one."""
    interrupt(3, *flags(world, tmp_path / "run", **SHORT))
    (tmp_path / "run" / "checkpoints" / "step-000003" / "state.json").write_text("{}")
    interrupt(3, "--resume", tmp_path / "run")
    assert [p.name for p in runs.checkpoints(tmp_path / "run")] == ["step-000003", "step-000002"]
    assert not any(map(runs.damage, runs.checkpoints(tmp_path / "run")))


def test_with_no_intact_checkpoint_left_nothing_is_resumed_and_nothing_started(world, tmp_path):
    interrupt(3, *flags(world, tmp_path / "run", **SHORT))
    for folder in runs.checkpoints(tmp_path / "run"):
        (folder / "state.json").write_text("{}")
    before = tree(tmp_path)
    refused(
        run("--resume", tmp_path / "run"), 3, "state.json is not as it was written", "--overwrite"
    )
    assert tree(tmp_path) == before


def test_the_newest_checkpoint_is_the_one_of_the_latest_step_not_of_the_last_name(tmp_path):
    for step in (999_999, 1_000_000, 5):
        (tmp_path / "checkpoints" / f"step-{step:06}").mkdir(parents=True)
    assert [p.name for p in runs.checkpoints(tmp_path)] == [
        "step-1000000",
        "step-999999",
        "step-000005",
    ]


# --- what never reaches a file --------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_and_the_records(
    world, tmp_path, monkeypatch
):
    for i, poison in enumerate([float("nan"), float("inf")]):
        loss_sum = rora.loss_sum
        folder = tmp_path / str(i)
        with at_step(
            2,
            lambda: monkeypatch.setattr(
                rora, "loss_sum", lambda *a, **k: loss_sum(*a, **k) * poison
            ),
        ):
            result = run(*flags(world, folder, **SHORT, val_size=0))
        monkeypatch.undo()
        refused(result, 4, "step 3", ", ".join(map(str, batch_of(step=3))), str(world.data))
        assert runs.checkpoints(folder)[0].name == "step-000002" and not any(
            map(runs.damage, runs.checkpoints(folder))
        )
        assert all(
            t.isfinite().all()
            for c in runs.checkpoints(folder)
            for t in load_file(c / "optimizer.safetensors").values()
        )
        assert run("--resume", folder).code == 0


def batch_of(step: int) -> list[int]:
    """The numbers of the records of a step (from 1) of the first epoch, with all 14 to train on."""
    return [j + 1 for j in epoch_order(14, seed=0, epoch=0)[4 * step - 4 : 4 * step]]


def test_a_gradient_that_is_not_finite_reaches_no_weight(world, tmp_path, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("inf")

    loss_sum = rora.loss_sum
    with at_step(
        2,
        lambda: monkeypatch.setattr(
            rora, "loss_sum", lambda *a, **k: Poison.apply(loss_sum(*a, **k))
        ),
    ):
        result = run(*flags(world, tmp_path / "run", **SHORT, val_size=0))
    refused(result, 4, "step 3", "gradient norm", "untouched")
    assert runs.checkpoints(tmp_path / "run")[0].name == "step-000002"


def test_weights_that_overflow_are_not_saved(world, tmp_path, monkeypatch):
    train_step = rora.train_step

    def overflow(model, *rest, **more):
        result = train_step(model, *rest, **more)
        if (tmp_path / "run" / "checkpoints").exists():  # the second step
            model.layers[0].self_attn.q_proj.lora_B.data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(rora, "train_step", overflow)
    refused(
        run(*flags(world, tmp_path / "run", **SHORT, val_size=0)),
        4,
        "layers.0.self_attn.q_proj.lora_B holds NaN or infinity",
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_a_learning_rate_that_blows_the_weights_up_ends_without_a_bad_file(world, tmp_path):
    refused(
        run(
            *flags(
                world,
                tmp_path / "run",
                **SHORT | {"max_steps": 30, "eval_every": 1},
                warmup=0,
                lr=1e18,
            )
        ),
        4,
        "step",
    )
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values()), path


def test_a_validation_loss_that_is_not_finite_chooses_no_adapter(world, tmp_path, monkeypatch):
    monkeypatch.setattr(rora, "validation_loss", lambda *a: float("nan"))
    refused(run(*flags(world, tmp_path / "run", **SHORT)), 4, "step 2: validation loss nan")
    assert (
        not (tmp_path / "run" / "adapter_model.safetensors").exists()
        and "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    )


def test_an_infinite_adapter_and_no_adapter_at_all_are_never_saved(tiny, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        rora.save_adapter(tiny, tmp_path)
    rora.attach(tiny, "rora", 4, 8)
    tiny.layers[0].self_attn.q_proj.lora_B.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="q_proj.lora_B holds NaN or infinity; nothing was saved"):
        rora.save_adapter(tiny, tmp_path)
    assert tree(tmp_path) == {}


def test_an_adapter_of_zeros_is_a_legal_first_step_but_never_a_result(world, tmp_path):
    """The first update has lr 0. Validated at once, it must not become a run's best adapter."""
    assert interrupt(1, *flags(world, tmp_path / "one", **SHORT)).code == 130
    first = load_file(
        tmp_path / "one" / "checkpoints" / "step-000001" / "adapter_model.safetensors"
    )
    assert not any(t.any() for name, t in first.items() if "lora_B" in name)
    assert run(*flags(world, tmp_path / "worse", **SHORT | {"eval_every": 1}, lr=1)).code == 0
    final = load_file(tmp_path / "worse" / "adapter_model.safetensors")
    assert any(t.any() for name, t in final.items() if "lora_B" in name)


@pytest.mark.parametrize("method", rora.METHODS)
def test_an_adapter_that_ends_as_it_started_is_never_a_result(world, tmp_path, method):
    scaled = rora.METHODS[method].layer.scale is not None
    how = SHORT | {"method": method, "alpha": 8 if scaled else None, "dropout": None, "lr": 1e-60}
    stopped = run(*flags(world, tmp_path / "run", **how))
    refused(stopped, 1, "is after 4 steps what it was at the start", "--lr")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_layer_that_gets_no_gradient_stops_the_run_and_is_named(world, tmp_path, monkeypatch):
    attach = jobs.attach

    def disconnect(model, *rest):
        attach(model, *rest)
        layer = model.layers[1].mlp.up_proj
        layer.forward = layer.base.forward

    monkeypatch.setattr(jobs, "attach", disconnect)
    refused(
        run(*flags(world, tmp_path / "run", **SHORT)),
        1,
        "no gradient reached layers.1.mlp.up_proj:",
    )
    assert runs.checkpoints(tmp_path / "run") == []


# --- memory ---------------------------------------------------------------------------------------

LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
]


@pytest.mark.parametrize("lack", LACKS, ids=lambda e: type(e).__name__)
def test_a_lack_of_memory_in_training_says_where_and_what_to_change(
    world, whole, tmp_path, monkeypatch, lack
):
    def fail(*args, **kwargs):
        raise lack

    with at_step(2, lambda: monkeypatch.setattr(rora, "train_step", fail)):
        result = run(*flags(world, tmp_path / "run", **SHORT))
    refused(
        result,
        1,
        "out of memory in step 3",
        "--micro-batch-size",
        "--checkpoint-blocks",
        "--rank",
        "intact",
    )
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run").code == 0 and outcome(tmp_path / "run") == outcome(
        whole
    )


@pytest.mark.parametrize("lack", LACKS, ids=lambda e: type(e).__name__)
def test_a_lack_of_memory_in_scoring_keeps_the_answers(world, whole, tmp_path, monkeypatch, lack):
    generate, calls = scoring.generate, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise lack
        return generate(*args)

    monkeypatch.setattr(scoring, "generate", fail)
    command = (whole, "--data", world.tests, "--batch-size", 3, "--out", tmp_path)
    refused(
        score(*command),
        1,
        "out of memory answering 3 questions of boolq",
        "--batch-size",
        "--dtype",
        "--device",
    )
    assert len(scoring.read_generations(tmp_path / "boolq.jsonl")) == 6
    assert score(*command).code == 0
