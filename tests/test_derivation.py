"""What the lessons on the derivation, on pruning and on real text rest on."""

import math
import sys
from array import array
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL
from torch import nn

sys.path.insert(0, str(ROOT / "lessons"))
import derivation
import derivation_page
import prune
import real_text

from data import Record
from llama import Llama, LlamaConfig
from plumbing.flags import FlagError
from rora import LoRALinear, RoRALinear


def texts(n: int) -> list[Record]:
    generator = torch.Generator().manual_seed(1)
    return [
        Record(array("i", torch.randint(0, 64, (12,), generator=generator).tolist()), 1, i)
        for i in range(n)
    ]


# --- the derivation -------------------------------------------------------------------------------


def test_equations_2_to_4_are_what_a_real_step_does():
    found = derivation.first_step_by_hand(p=16, rank=4)
    assert found["eq3"] < 1e-12 and found["eq4"] < 1e-12 and found["grad_A"] == 0


@pytest.mark.parametrize("rank", [4, 32])
def test_equation_9_is_wrong_and_the_exact_variance_is_right(rank):
    torch.manual_seed(0)
    found = derivation.moments(derivation.products(rank, 32, 8000))
    assert abs(found["mean"]) < 4 * found["mean_se"]
    assert abs(found["var"] - derivation.exact_variance(rank, 32)) < 4 * found["var_se"]
    assert abs(found["var"] - derivation.eq9_variance(rank, 32)) > 10 * found["var_se"]


def test_like_inputs_leave_a_coherent_part_that_grows_with_the_rank():
    torch.manual_seed(0)
    for rank in (4, 32):
        found = derivation.moments(derivation.products(rank, 32, 4000, rho=0.5))
        assert abs(found["mean"] - rank * 32 / 2) < 4 * found["mean_se"]


def test_the_real_initialisation_has_variance_one_third_over_the_width():
    torch.manual_seed(0)
    assert derivation.initial_variance(64) == pytest.approx(1 / 3, rel=0.05)
    found = derivation.moments(derivation.products(16, 32, 8000, real=True))
    assert abs(found["var"] - derivation.real_variance(16, 32)) < 4 * found["var_se"]


@pytest.mark.parametrize("rule, Layer", [("α/r", LoRALinear), ("α/√r", RoRALinear)])
def test_the_lessons_rules_are_the_methods(rule, Layer):
    base = nn.Linear(8, 8, bias=False)
    assert derivation.adapter(base, 4, rule).scaling == pytest.approx(
        Layer(base, 4, derivation.TINY.alpha).scaling
    )


def test_the_size_of_w_after_one_sgd_step_is_its_coherent_and_its_incoherent_part():
    found = derivation.averaged(
        [derivation.one_layer(64, "α/√r", "SGD", 128, seed) for seed in range(3)]
    )
    assert found["seen"] == pytest.approx(found["seen_formula"], rel=0.1)
    assert found["fresh"] == pytest.approx(found["fresh_formula"], rel=0.1)


def test_under_adamw_rora_is_lora_whose_B_learns_root_r_times_as_fast(tiny):
    size, records = {"steps": 10, "batch": 2}, texts(20)
    run = lambda rule, ratio: derivation.many_steps(
        tiny, records, records[:4], size, 16, rule, "AdamW", 1e-3, ratio
    )["losses"]
    rora, faster_B, lora = run("α/√r", 1.0), run("α/r", math.sqrt(16)), run("α/r", 1.0)
    assert faster_B == pytest.approx(rora, rel=1e-4)
    assert abs(lora[-1] - rora[-1]) > 100 * abs(faster_B[-1] - rora[-1])


def test_the_page_says_what_the_results_say():
    results = ROOT / "lessons" / "results" / "derivation.json"
    assert (
        derivation_page.page(derivation_page.Results(results))
        == (ROOT / "lessons" / "derivation.md").read_text()
    )


# --- pruning --------------------------------------------------------------------------------------


def test_what_does_nothing_is_what_goes_and_then_nothing_changes():
    torch.manual_seed(0)
    model = Llama(replace(SMALL, n_layers=3)).eval()
    channels, hidden, group, layer = (
        torch.arange(1, 32, 2),
        torch.arange(0, 24),
        0,
        1,
    )  # to be removed: half of each, and one layer
    with torch.no_grad():
        model.embed_tokens.weight[:, channels] = 0
        for i, block in enumerate(model.layers):
            o_proj, down_proj = block.self_attn.o_proj.weight, block.mlp.down_proj.weight
            o_proj[:, group * 16 : (group + 1) * 16] = (
                0  # two query heads of width 8 share a key head
            )
            down_proj[:, hidden] = 0
            for W in (o_proj, down_proj):
                W[channels] = 0
                W *= 20 * (i != layer)  # large enough to matter
    cfg = replace(SMALL, n_layers=2, dim=16, n_heads=2, n_kv_heads=1, hidden_dim=24)
    small, kept = prune.prune(model, cfg, prune.Missed(model, texts(8), 4))
    assert (
        kept["layers"] == [0, 2]
        and kept["groups"] == [[1], [1]]
        and kept["channels"] == list(range(0, 32, 2))
    )
    assert kept["ffn"] == [list(range(24, 48))] * 2
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        whole, pruned = model(ids), small(ids)
    assert (whole - pruned).abs().max() < 1e-4 * whole.abs().max()


def test_a_fifth_of_llama2_7b_has_the_shape_of_sheared_llama():
    whole = LlamaConfig(max_positions=4096)
    cfg = prune.smaller(whole, 0.2)
    assert (cfg.n_layers, cfg.n_heads, cfg.dim, cfg.head_dim) == (24, 16, 2048, 128)
    assert cfg.hidden_dim == pytest.approx(5504, abs=64)
    assert 0.19 < prune.parameters(cfg) / prune.parameters(whole) <= 0.2


def test_too_little_is_refused():
    with pytest.raises(FlagError, match="no FFN"):
        prune.smaller(SMALL, 0.01)


# --- real text ------------------------------------------------------------------------------------


def test_the_plain_text_of_a_record_has_no_prompt_no_labels_and_no_answer():
    told = {
        "instruction": "Please choose the correct answer to the question: What melts?\n\n"
        "Answer1: ice Answer2: stone\n\nAnswer format: answer1/answer2",
        "output": "the correct answer is answer1",
    }
    asked = {
        "instruction": "Please answer the following question with true or false, "
        "question: is ice cold?\n\nAnswer format: true/false"
    }
    assert real_text.plain(told) == "What melts? ice stone"
    assert real_text.plain(asked) == "is ice cold?"
