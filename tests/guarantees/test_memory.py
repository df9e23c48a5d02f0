"""What a step will take, said before it is taken."""

import weakref

import pytest
import torch
from conftest import shake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fast
import rora
from data import Batch, Record, collate
from llama import Llama, LlamaConfig
from plumbing import jobs, memory

CFG = LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80)


class Living(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, as torch makes and drops them."""

    def __init__(self, model):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0
        for p in model.parameters():
            self.count(p)

    def count(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.count(t)
        return out


def batch():
    return Batch(torch.randint(0, 80, (90,)), torch.randint(0, 80, (90,)), [40, 20, 30])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method, dropout",
    [("lora", 0.0), ("rora", 0.05), ("dora", 0.05), ("parallel", 0.0), ("prefix", 0.0)],
)
def test_a_block_is_planned_with_what_training_keeps_for_it(dtype, method, dropout):
    """The plan measures one block; the truth is a third of what three blocks keep in training."""
    model = Llama(CFG).to(dtype)
    rora.attach(model, method, 8, dropout=dropout)
    shake(model)
    model.train()
    b = batch()
    with fast.held(model):
        plan = memory.plan(model, b, 1 << 20)
        rows = model.rows(b.lengths)

        def blocks():
            x = model.embed_tokens(b.ids).detach().requires_grad_().clone()
            for layer in model.layers:
                x = layer(x, rows)
            return x

        truth = memory.saved_bytes(blocks) / 3
    assert plan.block == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["lora", "rora", "dora", "parallel", "prefix"])
@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_what_a_step_takes_is_within_15_percent_of_the_plan_and_planning_leaves_nothing_behind(
    dtype, method, recomputed
):
    cfg = LlamaConfig(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=172, vocab_size=500)
    model = Llama(cfg).to(dtype)
    rora.attach(model, method, 8, dropout=0.05 if method in ("lora", "rora", "dora") else 0.0)
    model.train()
    records = [Record(torch.randint(3, 80, (n,)).tolist(), 1, 1) for n in (40, 100, 90, 70) * 2]
    optimizer = rora.new_optimizer(model, 1e-3)
    step = lambda: rora.train_step(model, records, optimizer, 1e-3, 4, recomputed)
    step()  # makes AdamW's moments
    optimizer.zero_grad()
    living = Living(model)
    for moments in optimizer.state.values():
        for t in moments.values():
            living.count(t)
    with living:
        with fast.held(model):
            before = living.now
            plan = memory.plan(model, collate(records[:4]), fast.logit_bytes(torch.device("cpu")))
            assert living.now == before
        step()
    assert plan.total(recomputed) == pytest.approx(living.peak, rel=0.15)


def test_the_memory_line_is_planned_in_training_mode_and_draws_no_random_number():
    model = Llama(CFG)
    rora.attach(model, "rora", 8, dropout=0.05)
    records = [Record(torch.randint(3, 80, (n,)).tolist(), 1, 1) for n in (30, 9, 20, 12)]
    settings = jobs.Settings(
        ckpt="",
        data="",
        method="rora",
        scale="sqrt",
        rank=8,
        alpha=64,
        dropout=0.05,
        targets=(),
        loss="all",
        prompt="clean",
        max_len=64,
        epochs=1,
        max_steps=None,
        batch_size=2,
        lr=1e-3,
        warmup=1,
        val_size=0,
        eval_every=1,
        save_every=1,
        seed=0,
        dtype="fp32",
        micro_batch_size=2,
        checkpoint_blocks="auto",
    )
    state = torch.get_rng_state()
    plan, largest, recomputed = jobs.plan_memory(model, records, settings)
    assert torch.equal(torch.get_rng_state(), state) and recomputed == 0
    assert plan.tokens == sum(len(r.ids) - 1 for r in largest)
    assert plan.tokens == max(
        sum(collate([records[j] for j in part]).lengths)
        for order in [rora.epoch_order(4, 0, 0)]
        for part in (order[:2], order[2:])
    )


def test_as_few_blocks_are_recomputed_as_memory_allows():
    plan = memory.MemoryPlan(
        tokens=1, weights=100, adapters=10, block=20, block_input=2, logits=5, blocks=4
    )
    assert [plan.total(k) for k in (0, 1, 4)] == [
        100 + 10 + 80 + 16,
        100 + 10 + 60 + 2 + 16,
        100 + 10 + 8 + 20 + 16,
    ]
    assert [plan.fewest_recomputed(room) for room in (1000, 206, 205, 187, 0)] == [0, 0, 1, 2, 4]
