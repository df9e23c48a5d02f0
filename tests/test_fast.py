"""Each faster way beside the plain one that it equals; tests/test_gpu.py has those of a GPU."""

import pytest
import torch

import fast
import rora
from conftest import SMALL, shake
from data import Record, collate
from llama import Llama, apply_rope, generate, rope_tables

LENGTHS = [9, 5, 12, 7, 4]


def draw(n: int, seed: int) -> list[int]:
    return torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_rope_is_the_two_lines_of_the_formula_to_the_bit_and_so_is_its_gradient():
    x = torch.randn(30, 4, 16, requires_grad=True)
    cos, sin = rope_tables(torch.arange(30), 1e4 ** -(torch.arange(0, 16, 2) / 16))
    c, s = cos[..., :8], sin[..., 8:]  # each angle once
    x1, x2 = x.chunk(2, -1)
    plain = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    turned, d = apply_rope(x, cos, sin), torch.randn(30, 4, 16)
    assert torch.equal(turned, plain)
    assert torch.equal(*(torch.autograd.grad(y, x, d)[0] for y in (turned, plain)))


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    x, (cos, sin) = torch.randn(30, 4, 16), rope_tables(torch.arange(30), torch.rand(8))
    there = fast.rotate(x, cos, sin, x.dtype)
    assert torch.allclose(fast.rotate(there, cos, -sin, x.dtype), x, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in rora.METHODS if m != "prefix"])
@pytest.mark.parametrize("size", [5, 2], ids=["one micro-batch", "three"])
def test_a_micro_batch_filled_up_to_a_round_size_has_the_same_loss_and_gradients(
    method, size, monkeypatch
):
    """What CUDA graphs replay: rows without tokens, and one of padding that predicts nothing."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(fast.Graphs, "record", lambda *_: None)
    monkeypatch.setattr(fast.Graphs, "replay", lambda g, rows, inputs: g.work(rows, *inputs))
    torch.manual_seed(0)
    model = Llama(SMALL)
    rora.attach(model, method, 4)
    shake(model)
    records = [Record(draw(n, i), 1 + i % 3, i) for i, n in enumerate(LENGTHS)]
    graphs = fast.Graphs(model, size + 1, 24, 12, step=16)
    found = []
    for backward in (rora.backward, graphs.backward):
        model.zero_grad()
        batches = (collate(records[i : i + size]) for i in range(0, 5, size))
        loss = sum(backward(model, batches, rora.targets_in(records), 0))
        grads = [p.grad.clone() for p in rora.trainable(model).values()]
        found.append((loss, grads))
    (loss, grads), (there, theirs) = found
    assert torch.allclose(loss, there, rtol=1e-6)
    for a, b in zip(grads, theirs):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_tensors_cast_together_are_cast_as_each_by_itself_and_so_are_their_gradients():
    together = [torch.randn(n, 3, requires_grad=True) for n in (2, 5, 4)]
    apart = [x.detach().clone().requires_grad_() for x in together]
    for xs, casts in (
        (together, fast.Casts.apply(torch.bfloat16, *together)),
        (apart, [x.to(torch.bfloat16) for x in apart]),
    ):
        for _ in range(2):  # backwards twice: gradients add up in fp32
            (casts[0].square().sum() + 3 * casts[2].square().sum()).backward(retain_graph=True)
        assert all(y.dtype == torch.bfloat16 for y in casts) and xs[1].grad is None
    for x, plain in zip(together[::2], apart[::2]):
        assert x.grad.dtype == torch.float32 and torch.equal(x.grad, plain.grad)


@pytest.mark.parametrize("recomputed", [0, 1])
def test_casts_held_for_a_step_of_a_bf16_base_change_no_bit_of_a_gradient(recomputed):
    torch.manual_seed(0)
    model = Llama(SMALL).bfloat16()
    rora.attach(model, "rora", 4)
    shake(model)
    records = [Record(draw(n, i), 1, i) for i, n in enumerate(LENGTHS)]
    count, found = rora.targets_in(records), []
    for held in (True, False):
        model.zero_grad()
        batches = [collate(records[:2]), collate(records[2:])]
        if held:
            list(rora.backward(model, batches, count, recomputed))
        else:
            for batch in batches:
                (rora.loss_sum(model, batch) / count).backward()
        found.append([p.grad.clone() for p in rora.trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_dora_s_norms_are_computed_anew_when_the_base_moves_elsewhere():
    torch.manual_seed(0)
    model = Llama(SMALL)
    rora.attach(model, "dora", 4)
    before = fast.factored_norms(model)
    layer = next(iter(before))
    layer.base.weight = torch.nn.Parameter(2 * layer.base.weight, requires_grad=False)
    assert torch.allclose(fast.factored_norms(model)[layer], layer.norm())
    assert not torch.allclose(before[layer], layer.norm())


def test_norms_of_layers_of_one_shape_taken_together_are_each_layer_s_own(monkeypatch):
    """As on a GPU, where a launch for each layer would cost more than its work."""
    monkeypatch.setattr(fast, "alike", by_shape)
    torch.manual_seed(0)
    model = Llama(SMALL)
    rora.attach(model, "dora", 4)
    shake(model)
    for layer, norm in fast.factored_norms(model).items():
        assert torch.allclose(norm, layer.norm(), rtol=1e-5)


def by_shape(layers: list) -> list[list]:
    groups: dict = {}
    for layer in layers:
        groups.setdefault(layer.base.weight.shape, []).append(layer)
    return list(groups.values())


@pytest.mark.parametrize("method", [None, "prefix"])
def test_a_draft_changes_no_answer_and_saves_passes(method, monkeypatch):
    torch.manual_seed(0)
    model = Llama(SMALL)
    if method:
        rora.attach(model, method, 4)
    prompts = [[1, 5, 9, *draw(n, n)] for n in (3, 11, 6, 1)]
    plain = generate(model, prompts, 9, eos=2)
    passes, hidden = [], Llama.hidden
    count = lambda *a, **k: passes.append(0) or hidden(*a, **k)
    monkeypatch.setattr(Llama, "hidden", count)
    for draft in (plain[0][:4], plain[2][:8], [7], [7] * 30, plain[1] + [9, 9]):
        assert generate(model, prompts, 9, 2, draft) == plain
        for prompt, answer in zip(prompts, plain):
            assert generate(model, [prompt], 9, 2, draft) == [answer]
    passes.clear()
    generate(model, prompts[:1], 9, 2)
    without = len(passes)
    passes.clear()
    generate(model, prompts[:1], 9, 2, plain[0][:4])
    assert len(passes) == without - min(4, len(plain[0]))


def test_greedy_answers_are_those_of_whole_texts_without_a_cache():
    torch.manual_seed(0)
    model = Llama(SMALL)
    prompts = [[1, 5, *draw(n, n)] for n in (3, 11, 6, 1, 8)]
    whole = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 7 and (len(ids) == len(prompt) or ids[-1] != 2):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        whole.append([i for i in ids[len(prompt) :] if i != 2])
    for size in (1, 2, 3, 5):
        for draft in ([], whole[0][:3]):
            said = []
            for i in range(0, 5, size):
                said += generate(model, prompts[i : i + size], 7, 2, draft)
            assert said == whole


def test_the_last_block_may_work_for_the_tokens_that_are_asked_for_alone():
    torch.manual_seed(0)
    model = Llama(SMALL)
    for method in (None, "prefix"):
        if method:
            rora.attach(model, method, 4)
        ids, rows, asked = torch.tensor(draw(14, 0)), model.rows([9, 5]), torch.tensor([8, 2, 13])
        whole = model.hidden(ids, rows)
        assert torch.allclose(model.hidden(ids, rows, only=asked), whole[asked], atol=1e-6)


@torch.no_grad()
def test_doras_norm_is_of_the_weight_as_it_is_now():
    """‖W‖² is kept between steps: not beyond a change of W, in place or by a cast."""
    layer = rora.DoRALinear(torch.nn.Linear(8, 6, bias=False), rank=2, alpha=4)
    layer.lora_B.normal_()
    for change in (lambda: None, lambda: layer.base.weight.mul_(2), lambda: layer.base.bfloat16()):
        change()
        kept = fast.factored_norms(layer)[layer]
        assert torch.allclose(kept, layer.norm(), rtol=1e-2)
