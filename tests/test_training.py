"""The loop: schedule, loss, one step by hand, what must not change the result, and a whole run."""

import copy
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, shake, write_checkpoint, write_records

import fast
import rora
from data import IGNORE, Record, collate
from plumbing import run_folder as runs
from plumbing.flags import resolve, training_parser
from rora import (
    Recipe,
    attach,
    learning_rate,
    loss_sum,
    new_optimizer,
    train,
    train_step,
    trainable,
    validation_loss,
)


def record(n: int, split: int, number: int) -> Record:
    """n random tokens, of which those from `split` on are learned."""
    generator = torch.Generator().manual_seed(n)
    return Record(torch.randint(3, 64, (n,), generator=generator).tolist(), split, number)


RECORDS = [record(9, 1, 0), record(5, 1, 1), record(12, 6, 2), record(7, 1, 3), record(4, 2, 4)]


# --- schedule and loss ----------------------------------------------------------------------------


def test_the_learning_rate_rises_from_zero_to_its_peak_and_falls_towards_zero():
    lr = [learning_rate(step, steps=1000, peak=2e-4, warmup=100) for step in range(1000)]
    assert (lr[0], lr[50], lr[100]) == (0, pytest.approx(1e-4), pytest.approx(2e-4))
    assert (lr[550], lr[999]) == (pytest.approx(1e-4), pytest.approx(2e-4 / 900))


@pytest.mark.parametrize(
    "ckpt, rates",
    [
        ("llama-7b", {"lora": 3e-4, "rora": 2e-4, "dora": 2e-4}),
        ("llama-7b", {"series": 3e-4, "parallel": 3e-4, "prefix": 3e-2}),
        ("llama2-7b", {"lora": 3e-4, "rora": 2e-4, "dora": 2e-4}),
        ("llama3-8b", {"lora": 3e-4, "rora": 1e-4, "dora": 1e-4}),
        ("a/folder", {"lora": 3e-4, "rora": 2e-4, "dora": 2e-4}),
    ],
)
def test_the_default_rate_is_that_of_the_method_on_this_checkpoint(ckpt, rates):
    """DoRA's and LLM-Adapters' commands; the paper does not state RoRA's."""
    for method, rate in rates.items():
        flags = ["--ckpt", ckpt, "--method", method, "--device", "cpu"]
        settings, _ = resolve(training_parser().parse_args(flags))
        assert settings.lr == rate, method


def test_the_loss_is_cross_entropy_over_the_targets_of_each_row_alone(tiny):
    total = 0.0
    for r in RECORDS:
        logits = tiny(torch.tensor([r.ids[:-1]]))[0]  # (T, V)
        learned = torch.tensor(r.ids[r.split :])
        total += F.cross_entropy(logits[r.split - 1 :], learned, reduction="sum")
    assert torch.allclose(loss_sum(tiny, collate(RECORDS)), total, rtol=1e-5)


def test_what_the_loss_skips_is_the_prompt_alone(tiny):
    targets = collate(RECORDS).targets
    assert (targets == IGNORE).sum() == sum(r.split - 1 for r in RECORDS)


def test_a_frozen_heads_loss_in_slices_is_the_plain_loss(tiny, monkeypatch):
    attach(tiny, "rora", 4, 8)
    shake(tiny)
    monkeypatch.setattr(fast, "logit_bytes", lambda device: 4 * 64 * 3)  # three tokens at once

    def loss_and_gradients(head_trains):
        tiny.lm_head.weight.requires_grad_(head_trains)  # then the plain loss is used
        tiny.zero_grad()
        loss = loss_sum(tiny, collate(RECORDS))
        (loss / 7).backward()
        others = [p for p in trainable(tiny).values() if p is not tiny.lm_head.weight]
        return [loss.detach()] + [p.grad.clone() for p in others]

    for plain, sliced in zip(loss_and_gradients(True), loss_and_gradients(False), strict=True):
        assert torch.allclose(plain, sliced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_holding_casts_and_norms_for_a_step_changes_no_gradient(tiny, method):
    attach(tiny, method, 4, 8)
    shake(tiny)
    loss_sum(tiny, collate(RECORDS)).backward()
    plain = [p.grad.clone() for p in trainable(tiny).values()]
    tiny.zero_grad()
    with fast.held(tiny):
        loss_sum(tiny, collate(RECORDS), recomputed=1).backward()
    for gradient, p in zip(plain, trainable(tiny).values()):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-6)


# --- one step -------------------------------------------------------------------------------------


def test_one_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(tiny):
    attach(tiny, "rora", 4, 8)
    params, batch = trainable(tiny), collate(RECORDS)
    before = {name: p.detach().clone() for name, p in params.items()}
    mean = loss_sum(tiny, batch) / batch.learned
    gradient = dict(zip(params, torch.autograd.grad(mean, params.values())))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    _, told = train_step(
        tiny, RECORDS, new_optimizer(tiny, 1.0), lr=1e-2, micro_batch_size=5, clip=norm / 2
    )
    assert told == pytest.approx(norm, rel=1e-5)
    # AdamW's first step: m = 0.1 g and v = 0.001 g², which the bias correction makes g and g².
    for name, p in params.items():
        g = gradient[name] / 2
        assert torch.allclose(p, before[name] - 1e-2 * g / (g.abs() + 1e-8), atol=1e-4), name


def test_a_loss_that_is_not_finite_never_reaches_a_weight(tiny):
    attach(tiny, "rora", 4, 8)
    before = {name: p.detach().clone() for name, p in trainable(tiny).items()}
    tiny.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(rora.NonFiniteError):
        train_step(tiny, RECORDS, new_optimizer(tiny, 1e-2), 1e-2, 5)
    assert all(torch.equal(p, before[name]) for name, p in trainable(tiny).items())


def test_validation_draws_no_random_numbers_drops_nothing_out_and_leaves_the_model_training(tiny):
    attach(tiny.train(), "rora", 4, 8, dropout=0.5)
    shake(tiny)
    state = torch.get_rng_state()
    in_twos = validation_loss(tiny, RECORDS, 2)
    assert validation_loss(tiny, RECORDS, 5) == pytest.approx(in_twos, rel=1e-5)
    for mode in (False, True):
        validation_loss(tiny.train(mode), RECORDS, 2)
        assert tiny.training == mode  # as it was
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny.training


# --- the loop -------------------------------------------------------------------------------------


def told_by_train(tiny, done: int = 0):
    """Each step of two epochs of five records in batches of two."""
    torch.manual_seed(1)
    attach(tiny, "rora", 4, 8)
    recipe = Recipe(steps=6, batch_size=2, micro_batch_size=2, lr=1e-2, warmup=2, seed=3)
    return list(train(tiny, RECORDS, recipe, new_optimizer(tiny, 1e-2), done))


def test_the_loop_tells_every_step_and_prints_nothing(tiny, capfd):
    steps = told_by_train(tiny)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.lr for step in steps] == [learning_rate(i, 6, 1e-2, 2) for i in range(6)]
    assert capfd.readouterr() == ("", "")


def test_each_epoch_takes_every_record_once_and_ends_in_a_partial_batch(tiny):
    steps = told_by_train(tiny)
    assert [len(step.batch) for step in steps] == [2, 2, 1, 2, 2, 1]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(r.number for step in epoch for r in step.batch) == [0, 1, 2, 3, 4]
    assert [step.epoch for step in steps][2::3] == [1, 2]


def test_the_loop_goes_on_in_the_middle_of_an_epoch(tiny):
    """With the batches and learning rates that the whole loop has there."""
    steps, rest = told_by_train(copy.deepcopy(tiny)), told_by_train(tiny, done=4)
    assert [step.number for step in rest] == [5, 6]
    assert [(s.batch, s.lr) for s in rest] == [(s.batch, s.lr) for s in steps[4:]]


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ten steps on a toy checkpoint, through the command line."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "toy")
    write_records(folder / "train.json", 60)
    flags = (
        "--rank 4 --lr 1e-2 --warmup 2 --max-steps 10 --batch-size 8 --micro-batch-size 3 "
        "--val-size 10 --eval-every 4 --save-every 3"
    )
    files = {"--ckpt": "toy", "--data": "train.json", "--out": "out"}
    words = [word for flag, name in files.items() for word in (flag, str(folder / name))]
    assert rora.main([*words, *flags.split()]) == 0
    return folder / "out"


def rows(run, kind: str = "loss") -> list[dict]:
    """The lines of metrics.jsonl that hold this."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in line]


def test_a_run_learns(run):
    losses = [row["loss"] for row in rows(run)]
    assert losses[-1] < losses[0] - 0.1


def test_every_step_leaves_one_line_and_every_validation_one_more(run):
    assert [row["step"] for row in rows(run)] == list(range(1, 11))
    assert [row["step"] for row in rows(run, "val_loss")] == [4, 8, 10]
    keys = "step epoch loss lr grad_norm tokens tok_per_s mem_gb seconds".split()
    assert all(row.keys() == set(keys) for row in rows(run))
    assert [row["lr"] for row in rows(run)] == [learning_rate(i, 10, 1e-2, 2) for i in range(10)]


def test_a_runs_last_partial_batch_of_an_epoch_is_kept(run):
    """50 records in batches of 8: seven steps an epoch, the last of two records."""
    assert rows(run)[6]["epoch"] == 1
    assert rows(run)[6]["tokens"] < rows(run)[5]["tokens"] / 2


def test_the_folder_holds_the_best_adapter_and_run_json_says_which_step(run):
    about = json.loads((run / "run.json").read_text())
    best = min((row["val_loss"], row["step"]) for row in rows(run, "val_loss"))
    assert (about["best_loss"], about["best_step"]) == best
    assert about["finished"]
    assert rora.read_adapter(run, rora.METHODS)[0].rank == 4


def test_run_json_says_the_scale_that_was_used(run):
    about = json.loads((run / "run.json").read_text())
    assert about["settings"]["scale"] == "sqrt"
    assert about["effective_scale"] == 64 / 4**0.5


def test_run_json_says_which_version_made_it_the_newest_in_the_changelog(run):
    version = json.loads((run / "run.json").read_text())["version"]
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version


def test_two_checkpoints_are_kept_each_complete(run):
    folders = runs.checkpoints(run)
    assert [folder.name for folder in folders] == ["step-000010", "step-000009"]
    assert all(runs.damage(folder) is None for folder in folders)


def test_the_same_command_gives_the_same_run(tmp_path):
    write_checkpoint(tmp_path / "toy")
    write_records(tmp_path / "train.json", 24)
    files = ["--ckpt", str(tmp_path / "toy"), "--data", str(tmp_path / "train.json")]
    flags = "--rank 3 --max-steps 3 --val-size 4 --batch-size 4".split()
    adapters = []
    for name in ("one", "two"):
        assert rora.main([*files, *flags, "--out", str(tmp_path / name)]) == 0
        adapters.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
