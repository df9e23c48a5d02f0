"""CUDA's ways against the plain ones. Where there is no GPU these tests are skipped, and say so."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fast
import llama
import rora
from conftest import shake
from data import Record, collate
from llama import Llama, LlamaConfig, RMSNorm, apply_rope, generate, rope_tables

if not torch.cuda.is_available():
    pytest.skip("no GPU: CUDA's ways are not tested", allow_module_level=True)

HEADS = {"one key head for each": 4, "key heads shared by two": 2}
SHAPE = {"dim": 256, "n_layers": 3, "n_heads": 4, "hidden_dim": 512, "vocab_size": 320}
METHODS = list(rora.METHODS)
RECORDED = [m for m in METHODS if m != "prefix"]


def a_model(method: str | None, groups: int = 4, dropout: float = 0.0) -> Llama:
    """fp32, on the CPU, with an adapter that has moved; weights large enough that logits differ."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(n_kv_heads=groups, **SHAPE))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1) if "norm" in name else p.normal_(std=0.05)
    if method:
        rora.attach(model, method, 8, dropout=dropout)
        shake(model, 0.02)
    return model.train()


def some_records(n: int = 7, longest: int = 60) -> list[Record]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(5, longest, (n,), generator=generator).tolist()
    draw = lambda k: torch.randint(3, 320, (k,), generator=generator).tolist()
    return [Record(draw(k), 2, i) for i, k in enumerate(lengths)]


def loss_and_gradients(model: Llama, records: list[Record], size: int = 100, **how) -> tuple:
    """(loss, all gradients as one vector, fp32 on the CPU)."""
    backward, recomputed = how.get("backward", rora.backward), how.get("recomputed", 0)
    model.zero_grad()
    batches = (collate(records[i : i + size]) for i in range(0, len(records), size))
    loss = sum(x.item() for x in backward(model, batches, rora.targets_in(records), recomputed))
    grads = [p.grad.flatten() for p in rora.trainable(model).values()]
    return loss, torch.cat(grads).float().cpu()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far, as a part of how long."""
    return ((a - b).norm() / b.norm()).item()


def in_bf16(model: Llama) -> Llama:
    """On the GPU, the base in bf16, the adapters as they are."""
    model = copy.deepcopy(model).cuda()
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model


def graphs_of(model: Llama, rows: int = 7):
    return fast.Graphs(model, rows, 64 * rows, 64).backward


@pytest.mark.parametrize("groups", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_in_fp32_the_gpu_computes_what_the_cpu_does(method, groups):
    model = a_model(method, groups)
    loss, gradient = loss_and_gradients(model, some_records())
    there, theirs = loss_and_gradients(copy.deepcopy(model).cuda(), some_records())
    assert there == pytest.approx(loss, rel=1e-5)
    assert apart(theirs, gradient) < 1e-4


@pytest.mark.parametrize("groups", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_in_bf16_the_gpu_is_as_near_as_bf16_allows(method, groups):
    model = a_model(method, groups)
    loss, gradient = loss_and_gradients(model, some_records())
    there, theirs = loss_and_gradients(in_bf16(model), some_records())
    assert there == pytest.approx(loss, rel=5e-3)
    assert apart(theirs, gradient) < 0.1


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_blocks_change_no_bit_on_a_gpu(method):
    model = in_bf16(a_model(method))
    loss, gradient = loss_and_gradients(model, some_records())
    again, recomputed = loss_and_gradients(model, some_records(), recomputed=3)
    assert again == loss and torch.equal(recomputed, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_one_kernel_norm_is_the_formula(dtype):
    norm, x = RMSNorm(256, 1e-6).cuda().to(dtype), torch.randn(50, 256, device="cuda").to(dtype)
    norm.weight.data.uniform_(0.5, 2)
    x32 = x.double()
    formula = x32 / (x32.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert (norm(x) - formula).abs().max() < 5 * torch.finfo(dtype).eps * formula.abs().max() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_on_a_gpu_and_its_gradient_are_the_formula_s(dtype):
    x = torch.randn(50, 4, 64, device="cuda").to(dtype).requires_grad_()
    cos, sin = rope_tables(
        torch.arange(50, device="cuda"), 1e4 ** -(torch.arange(0, 64, 2).cuda() / 64)
    )
    y, d = apply_rope(x, cos, sin, dtype), torch.randn(50, 4, 64, device="cuda").to(dtype)
    (gradient,) = torch.autograd.grad(y, x, d)
    x64 = x.detach().double().requires_grad_()
    plain = x64 * cos.double() + x64.roll(32, -1) * sin.double()
    (truth,) = torch.autograd.grad(plain, x64, d.double())
    near = 4 * torch.finfo(dtype).eps
    assert (y - plain).abs().max() < near and (gradient - truth).abs().max() < 2 * near
    assert y.dtype == gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_s_norms_taken_together_are_each_layer_s_own(dtype):
    model = a_model("dora").cuda()
    if dtype == torch.bfloat16:
        model = in_bf16(a_model("dora"))
    norms = fast.factored_norms(model)
    assert len(norms) == 15
    for layer, norm in norms.items():
        assert torch.allclose(norm, layer.norm(), rtol=1e-5 if dtype == torch.float32 else 2e-3)


def test_a_dora_row_that_cancels_is_computed_plainly_among_others():
    model = in_bf16(a_model("dora"))
    layer = model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B.zero_()
        layer.lora_A.zero_()
        layer.lora_A[0] = layer.base.weight[0].float() / layer.scaling
        layer.lora_B[0, 0] = -1 + 1e-3
    assert torch.equal(fast.factored_norms(model)[layer], layer.norm())


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [7, 3], ids=["one micro-batch", "three"])
@pytest.mark.parametrize("method", RECORDED)
def test_a_replayed_step_is_the_eager_one(method, size, groups):
    """As near as bf16 allows: padding changes how a product is cut, not what it is."""
    model, records = in_bf16(a_model(method, groups)), some_records()
    loss, gradient = loss_and_gradients(model, records, size)
    backward = graphs_of(model, size)
    for _ in range(3):  # recorded, replayed, and replayed after something else
        there, theirs = loss_and_gradients(model, records, size, backward=backward)
        assert there == pytest.approx(loss, rel=2e-4)
        assert apart(theirs, gradient) < 0.02
        other, _ = loss_and_gradients(model, some_records(5, 30), size, backward=backward)
        assert other != there


@pytest.mark.parametrize("method", RECORDED)
def test_a_replayed_step_sees_new_weights(method):
    model, records = in_bf16(a_model(method)), some_records()
    backward = graphs_of(model)
    loss_and_gradients(model, records, backward=backward)
    with torch.no_grad():
        for p in rora.trainable(model).values():
            p.mul_(1.5)
    there, theirs = loss_and_gradients(model, records, backward=backward)
    loss, gradient = loss_and_gradients(model, records)
    assert there == pytest.approx(loss, rel=2e-4) and apart(theirs, gradient) < 0.02


def trained(model: Llama, steps: range, optimizer=None, dropout_seed: int | None = None) -> tuple:
    optimizer = optimizer or rora.new_optimizer(model, 1e-2)
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)
    backward, losses = graphs_of(model), []
    for i in steps:
        records = some_records(4 + i % 3, 30 + 25 * (i % 2))
        losses.append(rora.train_step(model, records, optimizer, 1e-2, 7, backward=backward))
        optimizer.zero_grad()
    return losses, optimizer


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("method", ["rora", "dora"])
def test_recorded_steps_resume_to_the_bit(method, dropout):
    """Recordings are made anew after a resume, in another order; that draws no random number."""
    whole, _ = trained(in_bf16(a_model(method, dropout=dropout)), range(8), dropout_seed=5)
    model = in_bf16(a_model(method, dropout=dropout))
    first, optimizer = trained(model, range(3), dropout_seed=5)
    state = copy.deepcopy(optimizer.state_dict()), torch.cuda.get_rng_state()
    torch.manual_seed(99)
    optimizer = rora.new_optimizer(model, 1e-2)
    optimizer.load_state_dict(state[0])
    torch.cuda.set_rng_state(state[1])
    rest, _ = trained(model, range(3, 8), optimizer)
    assert first + rest == whole


def test_dropout_differs_from_replay_to_replay():
    model, records = in_bf16(a_model("rora", dropout=0.5)), some_records()
    backward = graphs_of(model)
    losses = {loss_and_gradients(model, records, backward=backward)[0] for _ in range(4)}
    assert len(losses) == 4


def test_what_graphs_do_not_cover_is_refused_with_a_reason(monkeypatch):
    assert "prefix" in fast.Graphs.refusal(in_bf16(a_model("prefix")), 0)
    assert "recomputed" in fast.Graphs.refusal(in_bf16(a_model("rora")), 2)
    assert "bf16" in fast.Graphs.refusal(a_model("rora").cuda(), 0)
    assert fast.Graphs.refusal(in_bf16(a_model("rora")), 0) is None
    monkeypatch.setattr(llama, "varlen_attn", None)  # as in an older torch
    assert "torch 2.10" in fast.Graphs.refusal(in_bf16(a_model("rora")), 0)


# --- answering ------------------------------------------------------------------------------------


def prompts(n: int, alike: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 40, (n,), generator=generator).tolist()
    draw = lambda k: torch.randint(3, 320, (k,), generator=generator).tolist()
    return [list(range(1, 1 + alike)) + draw(k) for k in lengths]


@pytest.mark.parametrize("method", [None, "prefix", "rora"])
@pytest.mark.parametrize("groups", HEADS.values(), ids=HEADS)
def test_greedy_tokens_in_fp32_are_the_cpu_s(method, groups):
    model = a_model(method, groups).eval()
    there = generate(copy.deepcopy(model).cuda(), prompts(16), 12, 2)
    assert there == generate(model, prompts(16), 12, 2)


@pytest.mark.parametrize("method", [None, "prefix"])
@pytest.mark.parametrize("groups", HEADS.values(), ids=HEADS)
def test_a_look_into_the_cache_in_bf16_is_the_forward_pass(method, groups):
    """Each token that was chosen is the plain forward pass's first choice, or as good as."""
    model = in_bf16(a_model(method, groups)).eval()
    asked = prompts(24)
    for draft in ([], [5, 6]):
        for prompt, answer in zip(asked, generate(model, asked, 10, -1, draft)):
            ids = torch.tensor([prompt + answer], device="cuda")
            with torch.no_grad():
                logits = model(ids)[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            assert len(answer) == 10
            assert (logits.amax(1) - chosen).max() < 0.05 * logits.std()


def test_a_draft_changes_no_answer_on_a_gpu():
    model = a_model(None).cuda().eval()
    asked = prompts(16)
    plain = generate(model, asked, 12, 2)
    for draft in (plain[0][:4], plain[5][:7], [7], plain[3]):
        assert generate(model, asked, 12, 2, draft) == plain


def test_attention_without_padding_is_attention_row_by_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(30, h, 64, device="cuda").bfloat16() for h in (4, 2, 2))
    model = in_bf16(a_model(None, 2))
    rows = model.rows([4, 20, 6])
    from llama import attend

    y = attend(q, k, v, rows)
    for i, j in ((0, 4), (4, 24), (24, 30)):
        one = [x[None, i:j].transpose(1, 2).float() for x in (q, k, v)]
        plain = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        assert (y[i:j] - plain[0].transpose(0, 1)).abs().max() < 0.03
