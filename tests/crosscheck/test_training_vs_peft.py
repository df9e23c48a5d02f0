"""rora.py's training loop against PEFT, torch's AdamW and transformers' schedule: twenty steps."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from data import encode_records, epoch_order, load_tokenizer
from rora import main

pytestmark = pytest.mark.crosscheck

STEPS, BATCH, MICRO, WARMUP = 20, 5, 2, 6
RECORDS = (
    33  # seven batches an epoch, the last of three: twenty steps are two epochs and most of a third
)


def their_run(model, parameters: list, records: list, lr: float, padded) -> list[float]:
    """As transformers' Trainer takes them: mean over a batch's targets, clip, step, schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    orders = [epoch_order(RECORDS, 0, epoch) for epoch in range(3)]
    losses = []
    for batch in [order[i : i + BATCH] for order in orders for i in range(0, RECORDS, BATCH)][
        :STEPS
    ]:
        rows = [records[i] for i in batch]
        count = sum(len(r.ids) - r.split for r in rows)
        losses.append(0.0)
        for i in range(0, len(rows), MICRO):
            loss = model(**padded(rows[i : i + MICRO]), num_items_in_batch=count).loss
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    "method, loss, lr",
    [
        ("lora", "all", 5e-3),
        ("rora", "all", 5e-3),
        ("dora", "all", 5e-3),
        ("rora", "answer", 5e-3),
        ("prefix", "all", 3e-2),
    ],
)
def test_twenty_steps_give_the_losses_and_weights_of_a_peft_loop(
    method, loss, lr, make_base, records, padded, tmp_path, deviation
):
    folder, base = make_base()
    some = [
        task[i] for name, task in records.items() if name.startswith("train/") for i in range(7)
    ][:RECORDS]
    (tmp_path / "records.json").write_text(json.dumps(some))
    size = (
        ["--rank", "8"]
        if method == "prefix"
        else ["--rank", "8", "--alpha", "16", "--dropout", "0"]
    )
    command = [
        "--ckpt",
        str(folder),
        "--data",
        str(tmp_path / "records.json"),
        "--method",
        method,
        *size,
        "--loss",
        loss,
        "--lr",
        str(lr),
        "--warmup",
        str(WARMUP),
        "--batch-size",
        str(BATCH),
        "--micro-batch-size",
        str(MICRO),
        "--val-size",
        "0",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--checkpoint-blocks",
        "1",
    ]

    # The schedule's first step has lr 0: a run of one step saves what the longer run starts from.
    assert main([*command, "--max-steps", "1", "--out", str(tmp_path / "start")]) == 0
    assert main([*command, "--max-steps", str(STEPS), "--out", str(tmp_path / "run")]) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == STEPS
    assert (max(r["grad_norm"] for r in rows) > 1) == (
        method != "prefix"
    )  # what is clipped, and what is not, agrees

    theirs = PeftModel.from_pretrained(
        base, tmp_path / "start", is_trainable=method != "prefix"
    ).train()
    if method == "prefix":  # PEFT loads a prefix for use only
        theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    encoded, *_ = encode_records(some, load_tokenizer(folder), max_len=256, loss=loss)
    assert len(encoded) == RECORDS and len({len(r.ids) for r in encoded}) > 10
    losses = their_run(theirs, parameters, encoded, lr, padded)
    assert losses[0] - losses[-1] > 0.1  # it did learn something
    case = f"{method}, loss on {loss}"
    absolute, _ = deviation(
        f"{case}: losses of 20 steps",
        "PEFT + torch",
        torch.tensor([r["loss"] for r in rows]),
        torch.tensor(losses),
    )
    assert absolute < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (
            deviation(f"{case}: weights after 20 steps", "PEFT + torch", ours[name], theirs[name])[
                1
            ]
            < 1e-4
        ), name
