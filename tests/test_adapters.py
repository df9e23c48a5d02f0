"""What every method promises, whatever its mathematics. A new line in METHODS is tested here unasked."""

import copy
import json

import pytest
import fast
from plumbing import jobs
import torch
from conftest import shake
from torch import nn

import rora
from plumbing.hf_files import CheckpointError
from llama import Llama, LlamaConfig, generate
from rora import (
    METHODS,
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
FAMILY = ["lora", "rora", "dora"]


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FAMILY)
def test_training_starts_from_the_base_model(tiny, method):
    before = tiny(IDS)
    attach(tiny, method, 4, 8)
    assert torch.allclose(tiny(IDS), before, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_new_parameters_train_and_all_of_them_do(tiny, method):
    base = {name for name, _ in tiny.named_parameters()}
    attach(tiny, method, 4, 8)
    shake(tiny)
    tiny(IDS).square().mean().backward()
    moved = {name for name, p in tiny.named_parameters() if p.grad is not None and p.grad.any()}
    assert (
        moved == trainable(tiny).keys() and not {name.replace(".base", "") for name in moved} & base
    )


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_fp32_whatever_the_base(tiny, method):
    attach(tiny.bfloat16(), method, 4, 8)
    assert {p.dtype for p in trainable(tiny).values()} == {torch.float32}
    tiny(IDS).float().square().mean().backward()
    assert {p.grad.dtype for p in trainable(tiny).values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_comes_back_bit_for_bit_and_trainable(tiny, tmp_path, method):
    fresh = copy.deepcopy(tiny).eval()
    attach(tiny, method, 4, 8, dropout=0.25 if method in FAMILY else 0.0)
    shake(tiny)
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert not fresh.training and trainable(fresh).keys() == trainable(tiny).keys()
    assert rora.adapter_settings(fresh) == rora.adapter_settings(tiny)
    assert torch.equal(fresh(IDS), tiny.eval()(IDS))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_adapters_generates_with_its_cache_as_without(tiny, method):
    attach(tiny.eval(), method, 4, 8)
    shake(tiny)
    alike, unlike = [[5, 6, 7], [5, 6, 8, 6, 5, 4]], [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    for prompt, said in zip(
        alike + unlike, generate(tiny, alike, 6, eos=-1) + generate(tiny, unlike, 6, eos=-1)
    ):
        ids = list(prompt)
        for _ in range(6):
            ids.append(tiny(torch.tensor([ids]))[0, -1].argmax().item())
        assert ids[len(prompt) :] == said


@pytest.mark.parametrize("method", METHODS)
def test_merged_is_the_same_model_or_refused_with_the_reason(tiny, method):
    attach(tiny.eval(), method, 4, 8)
    shake(tiny)
    before = tiny(IDS)
    if hasattr(METHODS[method].layer, "merged_weight"):
        merge(tiny)
        assert not wrappers(tiny) and torch.allclose(tiny(IDS), before, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"{method} cannot be merged"):
            merge(tiny)


def test_what_is_saved_is_the_adapter_whether_it_trains_or_not(tiny, tmp_path):
    fresh = copy.deepcopy(tiny)
    attach(tiny, "dora", 4, 8)
    shake(tiny)
    tiny.requires_grad_(False)
    tiny.norm.weight.requires_grad_(True)  # and nothing else is
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS), tiny(IDS))


def test_a_method_of_ones_own_is_a_class_and_two_lines_and_comes_back_from_its_file(
    tiny, tmp_path, monkeypatch
):
    class FourthRootLinear(LoRALinear):
        scale = "fourth root"

    monkeypatch.setitem(rora.SCALES, "fourth root", lambda alpha, r: alpha / r**0.25)
    monkeypatch.setitem(METHODS, "fourth", rora.Method(FourthRootLinear))
    fresh = copy.deepcopy(tiny)
    attach(tiny, "fourth", 16, 8)
    shake(tiny)
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert {layer.scaling for layer in wrappers(fresh).values()} == {4.0} and torch.equal(
        fresh(IDS), tiny(IDS)
    )
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 64
    )  # PEFT divides by 16: the same 4


def test_a_misfit_leaves_the_model_as_it_was(tiny, tmp_path):
    saved(tiny, tmp_path)
    other = Llama(LlamaConfig(**{**tiny.cfg.__dict__, "n_layers": 1}))
    with pytest.raises(CheckpointError):
        load_adapter(other, tmp_path)
    assert not wrappers(other)


@pytest.mark.parametrize(
    "method, how",
    [("rora", {"alpha": 0}), ("lora", {"alpha": None}), ("series", {"targets": ["up_proj"]})],
)
def test_what_could_not_be_loaded_back_is_refused_at_once(tiny, method, how):
    with pytest.raises(ValueError):
        attach(tiny, method, 4, **how)
    assert not wrappers(tiny)


@pytest.mark.parametrize("method", METHODS)
def test_attach_works_on_a_model_without_memory(method):
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    attach(model, method, 8)
    assert all(p.is_meta for p in trainable(model).values())


def test_targets_that_match_nothing_are_refused_by_name(tiny):
    with pytest.raises(ValueError, match="called query; choose from .*q_proj"):
        attach(tiny, "lora", 4, targets=["query", "v_proj"])
    assert not wrappers(tiny)


def test_adapters_do_not_sit_on_adapters(tiny):
    attach(tiny, "lora", 4)
    with pytest.raises(ValueError, match="already"):
        attach(tiny, "dora", 4)


def test_parameters_are_named_as_the_layers_they_sit_on(tiny):
    attach(tiny, "dora", 4, targets=["q_proj"])
    assert list(trainable(tiny)) == [
        f"layers.{i}.self_attn.q_proj.{p}"
        for i in (0, 1)
        for p in ("lora_A", "lora_B", "magnitude")
    ]


@pytest.mark.parametrize(
    "cfg, base",
    [
        (LlamaConfig(), 6_738_415_616),
        (
            LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824),
            13_015_864_320,
        ),
        (
            LlamaConfig(
                dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=128256
            ),
            8_030_261_248,
        ),
        (
            LlamaConfig(dim=2048, n_layers=24, n_heads=16, n_kv_heads=16, hidden_dim=5504),
            1_345_423_360,
        ),
    ],
)
def test_the_papers_models_have_the_papers_parameters(cfg, base):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(cfg).parameters()) == base


@pytest.mark.parametrize(
    "method, size, added, share",
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
def test_the_start_up_line_counts_what_the_paper_counts_on_llama_7b(method, size, added, share):
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    attach(model, method, size)
    assert f"{added:,} of {added + 6_738_415_616:,} trainable ({share:.2f}%)" in jobs.start_line(
        model, method
    )


@pytest.mark.parametrize(
    "method, size, share_13b, share_8b",
    [
        ("lora", 32, 0.67, 0.70),
        ("rora", 128, 2.63, 2.74),
        ("dora", 32, 0.68, 0.71),
        ("series", 256, 0.80, None),
        ("parallel", 256, 2.89, None),
        ("prefix", 10, 0.03, None),
        ("prefix", 30, 0.09, None),
    ],
)
def test_and_on_13b_and_llama_3_8b(method, size, share_13b, share_8b):
    for cfg, share in [
        (
            LlamaConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824),
            share_13b,
        ),
        (LlamaConfig(n_kv_heads=8, hidden_dim=14336, vocab_size=128256), share_8b),
    ]:
        if share:
            with torch.device("meta"):
                model = Llama(cfg)
            attach(model, method, size)
            assert f"trainable ({share:.2f}%)" in jobs.start_line(model, method)


# --- LoRA, RoRA, DoRA -----------------------------------------------------------------------------


def layer_of(Layer, rank=4, alpha=8, dropout=0.0, out=16, dtype=torch.float32):
    torch.manual_seed(3)
    layer = Layer(
        nn.Linear(24, out, bias=False).to(dtype).requires_grad_(False), rank, alpha, dropout
    )
    shake(layer)
    return layer


@pytest.mark.parametrize(
    "Layer, rank, s",
    [
        (LoRALinear, 16, 64 / 16),
        (RoRALinear, 16, 64 / 4),
        (DoRALinear, 16, 64 / 16),
        (RoRALinear, 128, 5.657),
    ],
)
def test_each_method_has_its_scale(Layer, rank, s):
    assert Layer(nn.Linear(24, 16, bias=False), rank, 64).scaling == pytest.approx(s, rel=1e-4)


def test_dora_takes_either_scale_and_lora_and_rora_have_theirs_by_name(tiny):
    attach(tiny, "dora", 4, 8, scale="sqrt")
    assert {layer.scaling for layer in wrappers(tiny).values()} == {4.0}
    for method, scale in [("lora", "sqrt"), ("rora", "linear"), ("series", "sqrt")]:
        with pytest.raises(ValueError, match="does not take scale"):
            attach(tiny, method, 4, scale=scale)


@pytest.mark.parametrize("Layer", [LoRALinear, RoRALinear])
def test_lora_and_rora_are_the_formula(Layer):
    layer, x = layer_of(Layer), torch.randn(5, 24)
    W, A, B = (t.double() for t in (layer.base.weight, layer.lora_A, layer.lora_B))
    s = 8 / 4 if Layer is LoRALinear else 8 / 4**0.5
    assert torch.allclose(layer(x).double(), x.double() @ (W + s * B @ A).T, atol=1e-5)


def test_dora_is_the_formula():
    layer, x = layer_of(DoRALinear), torch.randn(5, 24)
    W, A, B, m = (
        t.double() for t in (layer.base.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    )
    V = W + 8 / 4 * B @ A
    assert torch.allclose(
        layer(x).double(), x.double() @ (m[:, None] * V / V.norm(dim=1, keepdim=True)).T, atol=1e-5
    )
    assert torch.allclose(layer.merged_weight().norm(dim=1), layer.magnitude.abs(), atol=1e-5)


def test_doras_norm_is_a_constant_to_the_gradient():
    layer, x = layer_of(DoRALinear), torch.randn(5, 24)
    layer(x).square().sum().backward()
    g = (layer.magnitude / layer.norm()).detach()  # y = g · (W x + s B A x), g fixed
    B = layer.lora_B.detach().clone().requires_grad_()
    (
        g * (x @ layer.base.weight.T + 2 * (x @ layer.lora_A.detach().T) @ B.T)
    ).square().sum().backward()
    assert torch.allclose(layer.lora_B.grad, B.grad, rtol=1e-5, atol=1e-5)


def test_doras_dropout_acts_on_the_adapter_alone():
    """With everything dropped, what is left is the base model rescaled: g · W x."""
    layer, x = layer_of(DoRALinear, dropout=0.999999), torch.randn(5, 24)
    assert torch.allclose(
        layer(x), layer.magnitude / layer.norm() * (x @ layer.base.weight.T), atol=1e-5
    )


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 5e-4)])
@pytest.mark.parametrize("rank", [2, 8, 40])  # 40 > min(I, O)
def test_doras_factored_norm_is_the_plain_one(dtype, error, rank):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(256, 192, bias=False).to(dtype).requires_grad_(False), rank, 16)
    shake(layer, 0.02)
    plain = layer.norm()
    with fast.held(layer):
        assert ((layer.norm() - plain) / plain).abs().max() < error


def test_zero_rows_and_rows_that_cancel_stay_finite():
    layer = layer_of(DoRALinear, rank=40)
    with torch.no_grad():
        layer.base.weight[0] = 0
        layer.lora_B[0] = 0
        layer.magnitude[0] = 0
        target = -layer.base.weight[1] * (1 - 1e-4)  # s B A = -0.9999 W on row 1
        layer.lora_B[1] = torch.linalg.lstsq(layer.lora_A.T, target / layer.scaling).solution
    x = torch.randn(5, 24)
    plain, norm = layer(x), layer.norm()
    with fast.held(layer):
        held = layer(x)
        assert torch.allclose(layer.norm(), norm, rtol=1e-5)
    assert (
        plain.isfinite().all()
        and torch.allclose(held, plain, rtol=1e-4, atol=1e-5)
        and not plain[:, 0].any()
    )


@pytest.mark.parametrize("Layer", [LoRALinear, DoRALinear])
def test_what_is_held_ends_with_the_loop_and_an_edit_outside_it_is_seen(Layer):
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


def test_backward_keeps_no_second_copy_of_a_weight_and_no_product_of_B_and_A():
    layer, x = layer_of(LoRALinear, out=16), torch.randn(50, 24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    shapes = sorted({tuple(t.shape) for t in saved if t.data_ptr() != layer.base.weight.data_ptr()})
    kept = {layer.lora_A.data_ptr(), layer.lora_B.data_ptr(), x.data_ptr()}
    new = [
        tuple(t.shape) for t in saved if t.data_ptr() not in kept | {layer.base.weight.data_ptr()}
    ]
    assert (
        new == [(50, 4)] and (16, 24) not in shapes
    )  # only lora_A x is new; W itself is held, not copied


def test_merging_rounds_once(tiny):
    model = tiny.bfloat16()
    attach(model, "rora", 4, 8)
    shake(model)
    layer = model.layers[0].mlp.up_proj
    exact = layer.base.weight.double() + 4.0 * layer.lora_B.double() @ layer.lora_A.double()
    merge(model)
    assert torch.equal(model.layers[0].mlp.up_proj.weight, exact.float().bfloat16())


# --- files ----------------------------------------------------------------------------------------


def saved(tiny, folder, method="rora", **config):
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
    assert (
        (config.get("use_rslora", False), config.get("use_dora", False)) == flags
        and config["r"] == 4
        and config["lora_alpha"] == 8
    )


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


def test_nan_is_never_saved_and_the_adapter_before_stays(tiny, tmp_path):
    saved(tiny, tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(iter(trainable(tiny).values())).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        save_adapter(tiny, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before and len(
        list(tmp_path.iterdir())
    ) == 2
