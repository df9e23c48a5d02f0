"""What LoRA, RoRA and DoRA compute, how much they add to the paper's models, and what is refused.

What every method promises is in test_methods.py.
"""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import shake
from torch import nn

import fast
from llama import Llama, LlamaConfig
from plumbing import jobs
from plumbing.hf_files import CheckpointError
from rora import (
    DoRALinear,
    LoRALinear,
    RoRALinear,
    attach,
    load_adapter,
    merge,
    save_adapter,
    trainable,
    wrappers,
)

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def layer_of(Layer, rank=4, alpha=8, dropout=0.0, out=16, dtype=torch.float32):
    """One adapted layer, 24 wide on the input side, moved off its start."""
    torch.manual_seed(3)
    base = nn.Linear(24, out, bias=False).to(dtype).requires_grad_(False)
    layer = Layer(base, rank, alpha, dropout)
    shake(layer)
    return layer


# --- the formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "Layer, rank, s",
    [
        (LoRALinear, 16, 64 / 16),
        (RoRALinear, 16, 64 / 4),
        (DoRALinear, 16, 64 / 16),
        (RoRALinear, 128, 5.657),
    ],
)
def test_the_scale_is_alpha_over_r_or_over_its_root(Layer, rank, s):
    assert Layer(nn.Linear(24, 16, bias=False), rank, 64).scaling == pytest.approx(s, rel=1e-4)


@pytest.mark.parametrize("Layer, s", [(LoRALinear, 8 / 4), (RoRALinear, 8 / 4**0.5)])
def test_lora_and_rora_are_the_formula(Layer, s):
    layer, x = layer_of(Layer, rank=4, alpha=8), torch.randn(5, 24)
    W, A, B = (t.double() for t in (layer.base.weight, layer.lora_A, layer.lora_B))
    assert torch.allclose(layer(x).double(), x.double() @ (W + s * B @ A).T, atol=1e-5)


def test_dora_is_the_formula():
    layer, x = layer_of(DoRALinear, rank=4, alpha=8), torch.randn(5, 24)
    tensors = (layer.base.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    W, A, B, m = (t.double() for t in tensors)
    V = W + 8 / 4 * B @ A
    merged = m[:, None] * V / V.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x).double(), x.double() @ merged.T, atol=1e-5)


def test_the_rows_of_doras_weight_are_as_long_as_its_magnitude_says():
    layer = layer_of(DoRALinear)
    assert torch.allclose(layer.merged_weight().norm(dim=1), layer.magnitude.abs(), atol=1e-5)


def test_doras_norm_is_a_constant_to_the_gradient():
    layer, x = layer_of(DoRALinear, rank=4, alpha=8), torch.randn(5, 24)
    layer(x).square().sum().backward()
    g = (layer.magnitude / layer.norm()).detach()  # y = g · (W x + s B A x), g fixed
    W, A = layer.base.weight, layer.lora_A.detach()
    B = layer.lora_B.detach().clone().requires_grad_()
    y = g * (x @ W.T + 8 / 4 * (x @ A.T) @ B.T)
    y.square().sum().backward()
    assert torch.allclose(layer.lora_B.grad, B.grad, rtol=1e-5, atol=1e-5)


def test_doras_dropout_acts_on_the_adapter_alone():
    """With everything dropped, what is left is the base model rescaled: g · W x."""
    layer, x = layer_of(DoRALinear, dropout=0.999999), torch.randn(5, 24)
    rescaled = layer.magnitude / layer.norm() * (x @ layer.base.weight.T)
    assert torch.allclose(layer(x), rescaled, atol=1e-5)


def test_dora_stays_finite_where_a_row_is_zero_or_cancels():
    layer = layer_of(DoRALinear, rank=40)
    with torch.no_grad():
        layer.base.weight[0] = 0
        layer.lora_B[0] = 0
        layer.magnitude[0] = 0
        target = -layer.base.weight[1] * (1 - 1e-4)  # s B A = -0.9999 W on row 1
        layer.lora_B[1] = torch.linalg.lstsq(layer.lora_A.T, target / layer.scaling).solution
    x = torch.randn(5, 24)
    plain, norm = layer(x), layer.norm()
    assert plain.isfinite().all()
    assert not plain[:, 0].any()
    with fast.held(layer):
        assert torch.allclose(layer.norm(), norm, rtol=1e-5)
        assert torch.allclose(layer(x), plain, rtol=1e-4, atol=1e-5)


def test_doras_row_of_zeros_learns_the_same_with_the_faster_norm():
    gradients = []
    for faster in (nullcontext, lambda: fast.held(layer)):
        layer, x = layer_of(DoRALinear), torch.randn(5, 24)
        with torch.no_grad():
            layer.base.weight[0] = 0
            layer.lora_B[0] = 0
            layer.magnitude.copy_(layer.norm())  # as at the start
        with faster():
            layer(torch.ones_like(x)).sum().backward()
        gradients.append(layer.lora_B.grad)
    assert gradients[0][0].abs().max() > 0.1
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("left", [1e-3, 0.01, 0.03, 0.05, 0.2])
@torch.no_grad()
def test_where_doras_terms_cancel_the_faster_norm_is_still_exact(left):
    """B A = -(1 - left) W: what is left of ‖W‖² is left²."""
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(1024, 64, bias=False), 64, 64)
    layer.lora_A.copy_(layer.base.weight)
    layer.lora_B.copy_(-(1 - left) * torch.eye(64))
    exact = (layer.base.weight.double() + layer.lora_B.double() @ layer.lora_A.double()).norm(dim=1)
    with fast.held(layer):
        assert ((layer.norm() - exact) / exact).abs().max() < 1e-4


def test_dora_on_a_layer_with_a_bias_is_refused():
    with pytest.raises(ValueError, match="bias"):
        DoRALinear(nn.Linear(8, 8), rank=2, alpha=4)


def test_merging_rounds_once(tiny):
    model = tiny.bfloat16()
    attach(model, "rora", 4, 8)
    shake(model)
    layer = model.layers[0].mlp.up_proj
    exact = layer.base.weight.double() + 8 / 4**0.5 * layer.lora_B.double() @ layer.lora_A.double()
    merge(model)
    assert torch.equal(model.layers[0].mlp.up_proj.weight, exact.float().bfloat16())


# --- the faster ways, compared with the plain ones ------------------------------------------------


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 5e-4)])
@pytest.mark.parametrize("rank", [2, 8, 40])  # 40 > min(I, O)
def test_doras_norm_from_small_products_is_the_plain_one(dtype, error, rank):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(256, 192, bias=False).to(dtype).requires_grad_(False), rank, 16)
    shake(layer, 0.02)
    plain = layer.norm()
    with fast.held(layer):
        assert ((layer.norm() - plain) / plain).abs().max() < error


@pytest.mark.parametrize("Layer", [LoRALinear, DoRALinear])
def test_what_is_held_ends_with_the_loop_and_an_edit_after_it_is_seen(Layer):
    layer, x = layer_of(Layer), torch.randn(5, 24)
    with fast.held(layer):
        before = layer(x)
    with torch.no_grad():
        layer.lora_B += 1
    assert not torch.allclose(layer(x), before)
    assert torch.allclose(layer(x), x @ layer.merged_weight().T, atol=1e-4)


def test_held_casts_pass_their_gradients_to_the_fp32_originals_over_many_backward_passes():
    layer = layer_of(LoRALinear, dtype=torch.bfloat16)
    xs = torch.randn(3, 5, 24, dtype=torch.bfloat16)
    for x in xs:
        layer(x).float().square().sum().backward()
    each = layer.lora_A.grad.clone()
    layer.zero_grad()
    with fast.held(layer):
        for x in xs:
            layer(x).float().square().sum().backward()
    assert torch.equal(layer.lora_A.grad, each)


def test_the_forward_pass_keeps_one_new_tensor_for_the_backward_pass():
    """lora_A x, with r numbers per token. No copy of W is kept, and no product lora_B lora_A."""
    layer, x = layer_of(LoRALinear, rank=4), torch.randn(50, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    there_before = {t.data_ptr() for t in (layer.base.weight, layer.lora_A, layer.lora_B, x)}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in there_before] == [(50, 4)]


# --- where they sit -------------------------------------------------------------------------------


def test_parameters_are_named_as_the_layers_they_sit_on(tiny):
    attach(tiny, "dora", 4, targets=["q_proj"])
    assert list(trainable(tiny)) == [
        "layers.0.self_attn.q_proj.lora_A",
        "layers.0.self_attn.q_proj.lora_B",
        "layers.0.self_attn.q_proj.magnitude",
        "layers.1.self_attn.q_proj.lora_A",
        "layers.1.self_attn.q_proj.lora_B",
        "layers.1.self_attn.q_proj.magnitude",
    ]


def test_targets_that_match_nothing_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match="called query; choose from .*q_proj"):
        attach(tiny, "lora", 4, targets=["query", "v_proj"])
    assert not wrappers(tiny)


def test_adapters_do_not_sit_on_adapters(tiny):
    attach(tiny, "lora", 4)
    with pytest.raises(ValueError, match="already"):
        attach(tiny, "dora", 4)


def test_dora_takes_either_scale_and_lora_and_rora_have_theirs_by_name(tiny):
    attach(tiny, "dora", 4, 8, scale="sqrt")
    assert {layer.scaling for layer in wrappers(tiny).values()} == {8 / 4**0.5}
    for method, scale in [("lora", "sqrt"), ("rora", "linear"), ("series", "sqrt")]:
        with pytest.raises(ValueError, match="does not take scale"):
            attach(tiny, method, 4, scale=scale)


@pytest.mark.parametrize(
    "method, how",
    [("rora", {"alpha": 0}), ("lora", {"alpha": None}), ("series", {"targets": ["up_proj"]})],
)
def test_what_could_not_be_loaded_back_is_refused_at_once(tiny, method, how):
    with pytest.raises(ValueError):
        attach(tiny, method, 4, **how)
    assert not wrappers(tiny)


# --- the paper's counts ---------------------------------------------------------------------------

LLAMA_7B = LlamaConfig()
LLAMA_13B = LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824)
LLAMA_3_8B = LlamaConfig(n_kv_heads=8, hidden_dim=14336, vocab_size=128256)
SHEARED_1_3B = LlamaConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5504)


def without_memory(cfg: LlamaConfig) -> Llama:
    with torch.device("meta"):
        return Llama(cfg)


@pytest.mark.parametrize(
    "cfg, base",
    [
        (LLAMA_7B, 6_738_415_616),
        (LLAMA_13B, 13_015_864_320),
        (LLAMA_3_8B, 8_030_261_248),
        (SHEARED_1_3B, 1_345_423_360),
    ],
)
def test_the_papers_models_have_the_papers_parameters(cfg, base):
    assert sum(p.numel() for p in without_memory(cfg).parameters()) == base


@pytest.mark.parametrize(
    "method, rank, added, share",
    [
        ("lora", 32, 56_098_816, 0.83),
        ("rora", 128, 4 * 56_098_816, 3.22),
        ("dora", 32, 56_098_816 + 876_544, 0.84),
        ("series", 256, 67_108_864, 0.99),
        ("parallel", 256, 247_463_936, 3.54),
        ("prefix", 10, 2_621_440, 0.04),
        ("prefix", 30, 7_864_320, 0.12),
    ],
)
def test_the_start_up_line_counts_what_the_paper_counts_on_llama_7b(method, rank, added, share):
    model = without_memory(LLAMA_7B)
    attach(model, method, rank)
    counted = f"{added:,} of {added + 6_738_415_616:,} trainable ({share:.2f}%)"
    assert counted in jobs.start_line(model, method)


@pytest.mark.parametrize(
    "cfg, method, rank, share",
    [
        (LLAMA_13B, "lora", 32, 0.67),
        (LLAMA_13B, "rora", 128, 2.63),
        (LLAMA_13B, "dora", 32, 0.68),
        (LLAMA_13B, "series", 256, 0.80),
        (LLAMA_13B, "parallel", 256, 2.89),
        (LLAMA_13B, "prefix", 10, 0.03),
        (LLAMA_13B, "prefix", 30, 0.09),
        (LLAMA_3_8B, "lora", 32, 0.70),
        (LLAMA_3_8B, "rora", 128, 2.74),
        (LLAMA_3_8B, "dora", 32, 0.71),
    ],
)
def test_the_shares_on_llama_13b_and_llama_3_8b_are_the_papers_too(cfg, method, rank, share):
    model = without_memory(cfg)
    attach(model, method, rank)
    assert f"trainable ({share:.2f}%)" in jobs.start_line(model, method)


def test_the_start_up_line_says_scale_share_and_what_peft_calls_it():
    model = without_memory(LLAMA_7B)
    attach(model, "rora", 128)
    assert jobs.start_line(model, "rora") == (
        "rora: s = 64/√128 = 5.657 · 224,395,264 of 6,962,810,880 trainable (3.22%) · "
        "PEFT: use_rslora=true"
    )


# --- files ----------------------------------------------------------------------------------------


def saved(tiny, folder, method="rora", **config):
    """Save an adapter, then change its config; returns a fresh base to load it on."""
    attach(tiny, method, 4, 8)
    shake(tiny)
    save_adapter(tiny, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with torch.device("meta"):
        return Llama(tiny.cfg)


@pytest.mark.parametrize(
    "method, flags", [("lora", (False, False)), ("rora", (True, False)), ("dora", (False, True))]
)
def test_peft_is_told_the_method_by_its_own_flags(tiny, tmp_path, method, flags):
    saved(tiny, tmp_path, method)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config.get("use_rslora", False), config.get("use_dora", False)) == flags
    assert (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    "method, config, named",
    [
        ("rora", {"r": 5}, '"r" is 5'),
        ("rora", {"target_modules": ["q_proj"]}, '"target_modules"'),
        ("dora", {"use_dora": False}, "use_dora"),
        ("lora", {"use_dora": True}, "missing .*magnitude"),
        ("lora", {"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ("lora", {"bias": "all"}, "bias"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("lora", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("lora", {"peft_type": "IA3"}, "peft_type"),
        ("lora", {"layers_to_transform": [0]}, "layers_to_transform"),
        ("prefix", {"num_virtual_tokens": 5}, "prompt_embeddings"),
        ("prefix", {"prefix_projection": True}, "prefix_projection"),
        ("parallel", {"non_linearity": "relu"}, "non_linearity"),
        ("rora", {"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_a_config_that_does_not_fit_or_is_not_computed_here_is_refused_by_name(
    tiny, tmp_path, method, config, named
):
    fresh = saved(tiny, tmp_path, method, **config)
    with pytest.raises(CheckpointError, match=named):
        load_adapter(fresh, tmp_path)


def test_an_adapter_of_another_base_is_refused(tiny, tmp_path):
    saved(tiny, tmp_path)
    for change in ({"dim": 48}, {"n_layers": 1}, {"n_layers": 3}):
        with torch.device("meta"):
            other = Llama(LlamaConfig(**{**tiny.cfg.__dict__, **change}))
        with pytest.raises(CheckpointError, match="layers"):
            load_adapter(other, tmp_path)


def test_a_misfit_leaves_the_model_as_it_was(tiny, tmp_path):
    saved(tiny, tmp_path)
    other = Llama(LlamaConfig(**{**tiny.cfg.__dict__, "n_layers": 1}))
    with pytest.raises(CheckpointError):
        load_adapter(other, tmp_path)
    assert not wrappers(other)


def test_what_is_saved_is_the_adapter_whether_it_trains_or_not(tiny, tmp_path):
    fresh = copy.deepcopy(tiny)
    attach(tiny, "dora", 4, 8)
    shake(tiny)
    tiny.requires_grad_(False)
    tiny.norm.weight.requires_grad_(True)  # and nothing else is
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), tiny(IDS))


def test_nan_is_never_saved_and_the_adapter_before_stays(tiny, tmp_path):
    saved(tiny, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(iter(trainable(tiny).values())).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(tiny, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
