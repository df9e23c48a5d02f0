"""The loop: schedule, micro-batches, one step by hand, and what must not change the result."""

import json
import math

import pytest
from plumbing import jobs
import fast
import llama
from plumbing import run_folder as runs
import torch
import torch.nn.functional as F
from conftest import shake, write_checkpoint, write_records

import rora
from data import IGNORE, Record, collate
from rora import (
    attach,
    learning_rate,
    loss_sum,
    new_optimizer,
    train_step,
    trainable,
    validation_loss,
)

RECORDS = [
    Record(
        torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist(), split, i
    )
    for i, (n, split) in enumerate([(9, 1), (5, 1), (12, 6), (7, 1), (4, 2)])
]


def test_the_schedule_rises_from_zero_to_its_peak_and_falls_towards_zero():
    lr = [learning_rate(step, steps=1000, peak=2e-4, warmup=100) for step in range(1000)]
    assert lr[0] == 0 and lr[50] == pytest.approx(1e-4) and lr[100] == pytest.approx(2e-4)
    assert lr[550] == pytest.approx(1e-4) and lr[999] == pytest.approx(2e-4 / 900)


def test_the_loss_is_cross_entropy_over_the_targets_of_the_padded_batch(tiny):
    batch = collate(RECORDS)
    start, total = 0, 0.0
    for r, n in zip(RECORDS, batch.lengths):
        logits = tiny(torch.tensor([r.ids[:-1]]))[0]
        total += F.cross_entropy(
            logits[r.split - 1 :], torch.tensor(r.ids[r.split :]), reduction="sum"
        )
        start += n
    assert (
        torch.allclose(loss_sum(tiny, batch), total, rtol=1e-5)
        and (batch.targets == IGNORE).sum() == 5 + 1
    )


def test_a_frozen_heads_sliced_loss_is_the_plain_loss(tiny, monkeypatch):
    attach(tiny, "rora", 4, 8)
    shake(tiny)
    monkeypatch.setattr(fast, "logit_bytes", lambda device: 4 * 64 * 3)  # three tokens at once

    def measure(plain):
        tiny.lm_head.weight.requires_grad_(plain)
        tiny.zero_grad()
        loss = loss_sum(tiny, collate(RECORDS))
        (loss / 7).backward()
        return [loss.detach()] + [
            p.grad.clone() for p in trainable(tiny).values() if p is not tiny.lm_head.weight
        ]

    for a, b in zip(measure(plain=True), measure(plain=False)):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", rora.METHODS)
def test_the_result_does_not_depend_on_the_micro_batch_size(tiny, method):
    def steps(micro):
        torch.manual_seed(0)
        model = rora.Llama(tiny.cfg)
        model.load_state_dict(tiny.state_dict())
        torch.manual_seed(1)
        attach(model, method, 4, 8)
        optimizer = new_optimizer(model, 1e-2)
        out = []
        for _ in range(3):
            out.append(train_step(model, RECORDS, optimizer, 1e-2, micro))
            optimizer.zero_grad()
        return out

    whole = steps(5)
    for micro in (1, 2, 3):
        for (loss, norm), (loss1, norm1) in zip(whole, steps(micro)):
            assert loss1 == pytest.approx(loss, rel=1e-5) and norm1 == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_holding_casts_and_norms_for_a_step_changes_nothing(tiny, method):
    attach(tiny, method, 4, 8)
    shake(tiny)
    loss_sum(tiny, collate(RECORDS)).backward()
    plain = [p.grad.clone() for p in trainable(tiny).values()]
    tiny.zero_grad()
    with fast.held(tiny):
        loss_sum(tiny, collate(RECORDS), recomputed=1).backward()
    for a, p in zip(plain, trainable(tiny).values()):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)


def test_one_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(tiny):
    attach(tiny, "rora", 4, 8)
    params = trainable(tiny)
    before = {n: p.detach().clone() for n, p in params.items()}
    batch = collate(RECORDS)
    gradient = dict(
        zip(params, torch.autograd.grad(loss_sum(tiny, batch) / batch.learned, params.values()))
    )
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    loss, reported = train_step(
        tiny, RECORDS, new_optimizer(tiny, 1.0), lr=1e-2, micro_batch_size=5, clip=norm / 2
    )
    assert reported == pytest.approx(norm, rel=1e-5)
    for (
        name,
        p,
    ) in (
        params.items()
    ):  # AdamW's first step: m = 0.1 g, v = 0.001 g², both bias-corrected to g and g²
        g = gradient[name] / 2
        assert torch.allclose(p, before[name] - 1e-2 * g / (g.abs() + 1e-8), atol=1e-4), name


def test_a_loss_that_is_not_finite_never_reaches_a_weight(tiny):
    attach(tiny, "rora", 4, 8)
    before = {n: p.detach().clone() for n, p in trainable(tiny).items()}
    tiny.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(rora.NonFiniteError):
        train_step(tiny, RECORDS, new_optimizer(tiny, 1e-2), 1e-2, 5)
    assert all(torch.equal(p, before[n]) for n, p in trainable(tiny).items())


def test_validation_draws_no_random_numbers_drops_nothing_out_and_leaves_the_model_training(tiny):
    attach(tiny.train(), "rora", 4, 8, dropout=0.5)
    shake(tiny)
    state = torch.get_rng_state()
    one, two = validation_loss(tiny, RECORDS, 2), validation_loss(tiny, RECORDS, 5)
    assert (
        one == pytest.approx(two, rel=1e-5)
        and torch.equal(torch.get_rng_state(), state)
        and tiny.training
    )


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ten steps on a toy checkpoint, through the command line."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "toy")
    write_records(folder / "train.json", 60)
    code = rora.main(
        [
            "--ckpt",
            str(folder / "toy"),
            "--data",
            str(folder / "train.json"),
            "--rank",
            "4",
            "--lr",
            "1e-2",
            "--warmup",
            "2",
            "--batch-size",
            "8",
            "--micro-batch-size",
            "3",
            "--max-steps",
            "10",
            "--val-size",
            "10",
            "--eval-every",
            "4",
            "--save-every",
            "3",
            "--out",
            str(folder / "out"),
        ]
    )
    assert code == 0
    return folder / "out"


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns(run):
    losses = [r["loss"] for r in rows(run) if "loss" in r]
    assert losses[-1] < losses[0] - 0.1


def test_every_step_leaves_one_line_and_every_validation_one_more(run):
    steps = [r for r in rows(run) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert all(
        r.keys()
        == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tok_per_s", "mem_gb", "seconds"}
        for r in steps
    )
    assert [r["lr"] for r in steps] == [learning_rate(i, 10, 1e-2, 2) for i in range(10)]
    assert [r["step"] for r in rows(run) if "val_loss" in r] == [4, 8, 10]


def test_the_last_partial_batch_of_an_epoch_is_kept(run):
    epochs = [r["epoch"] for r in rows(run) if "loss" in r]
    assert epochs[6] == 1  # 50 records in batches of 8: seven steps, the last of two records
    tokens = [r["tokens"] for r in rows(run) if "loss" in r]
    assert tokens[6] < tokens[5] / 2


def test_the_folder_holds_the_best_adapter_and_run_json_says_which_step(run):
    record = json.loads((run / "run.json").read_text())
    best = min((r["val_loss"], r["step"]) for r in rows(run) if "val_loss" in r)
    assert (record["best_loss"], record["best_step"]) == best and record["finished"]
    assert record["effective_scale"] == 32 and record["settings"]["scale"] == "sqrt"  # 64 / √4
    assert rora.read_adapter(run)[0].rank == 4


def test_two_checkpoints_are_kept_each_complete(run):
    folders = runs.checkpoints(run)
    assert [f.name for f in folders] == ["step-000010", "step-000009"]
    assert all(runs.damage(f) is None for f in folders)


@pytest.mark.parametrize("method", rora.METHODS)
def test_every_method_trains_is_saved_and_scored(tmp_path, method, capsys):
    import eval as judge

    write_checkpoint(tmp_path / "toy")
    data = write_records(tmp_path / "train.json", 24)
    tests = write_records(tmp_path / "tests/boolq.json", 9)
    out = str(tmp_path / "out")
    assert (
        rora.main(
            [
                "--ckpt",
                str(tmp_path / "toy"),
                "--data",
                str(data),
                "--method",
                method,
                "--rank",
                "3",
                "--max-steps",
                "3",
                "--warmup",
                "1",
                "--batch-size",
                "4",
                "--val-size",
                "4",
                "--out",
                out,
            ]
        )
        == 0
    )
    assert judge.main([out, "--data", str(tests.parent)]) == 0
    results = json.loads((tmp_path / "out/eval/results.json").read_text())
    assert results["tasks"]["boolq"]["n"] == 9 and results["mean"] is None
    assert results["merged"] == (method in ("lora", "rora", "dora"))
    assert f"{method}: " in capsys.readouterr().out


def test_the_same_command_gives_the_same_run(tmp_path):
    write_checkpoint(tmp_path / "toy")
    data = write_records(tmp_path / "train.json", 24)
    for name in ("a", "b"):
        assert (
            rora.main(
                [
                    "--ckpt",
                    str(tmp_path / "toy"),
                    "--data",
                    str(data),
                    "--rank",
                    "3",
                    "--max-steps",
                    "3",
                    "--val-size",
                    "4",
                    "--batch-size",
                    "4",
                    "--out",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
    read = lambda name: (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert read("a") == read("b")


def test_the_start_up_line_says_scale_share_and_what_peft_calls_it():
    with torch.device("meta"):
        model = rora.Llama(llama.LlamaConfig())
    attach(model, "rora", 128)
    assert (
        jobs.start_line(model, "rora")
        == "rora: s = 64/√128 = 5.657 · 224,395,264 of 6,962,810,880 trainable (3.22%) · PEFT: use_rslora=true"
    )
