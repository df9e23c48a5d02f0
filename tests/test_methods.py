"""What every method promises, whatever its mathematics. A new row in METHODS is tested unasked.

VeRA is the example of a method of one's own. It is not in METHODS; the tests add its one row, and
ask of it all that they ask of the others. Its tensors are not LoRA's: the matrices are frozen, and
the same in every layer of one shape; two vectors are trained.
"""

import copy
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import shake, write_checkpoint, write_records
from torch import Tensor, nn

import eval as judge
import rora
from data import Record
from llama import Llama, LlamaConfig, generate
from plumbing.hf_files import CheckpointError
from plumbing.jobs import start_line
from rora import (
    METHODS,
    SCALES,
    LoRALinear,
    Method,
    attach,
    load_adapter,
    merge,
    new_optimizer,
    save_adapter,
    train_step,
    trainable,
    wrappers,
)

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
LENGTHS_AND_SPLITS = [(9, 1), (5, 1), (12, 6), (7, 1), (4, 2)]


@functools.cache
@torch.inference_mode(False)  # they are kept for training, even if generate asks first
def shared_matrices(rank: int, width_in: int, width_out: int) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r), random, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(0)
    A = torch.empty(rank, width_in).uniform_(-1, 1, generator=generator) / width_in**0.5
    B = torch.empty(width_out, rank).uniform_(-1, 1, generator=generator) / rank**0.5
    return A, B


class VeRALinear(nn.Module):
    """y = W x + b ∘ B (d ∘ A x): A, B frozen and shared, the vectors d (r) and b (O) trained.

    VeRA, arXiv 2310.11454, Eq. 2. d starts at 0.1 and b at 0, so the update starts at 0.
    """

    base_type = nn.Linear
    targets = ("q_proj", "v_proj")
    any_target = True
    alpha = scale = None

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None, dropout: float = 0.0):
        super().__init__()
        self.base, self.rank, self.dropout = base, rank, nn.Dropout(dropout)
        device = base.weight.device
        self.vera_d = nn.Parameter(torch.full((rank,), 0.1, device=device))
        self.vera_b = nn.Parameter(torch.zeros(base.out_features, device=device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        A, B = shared_matrices(self.rank, self.base.in_features, self.base.out_features)
        return A.to(self.base.weight), B.to(self.base.weight)

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        A, B = self.matrices()
        low = self.vera_d.to(x.dtype) * F.linear(self.dropout(x), A)  # (..., r)
        return self.base(x) + self.vera_b.to(x.dtype) * F.linear(low, B)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:  # (O, I), fp32
        A, B = (t.float() for t in self.matrices())
        return self.base.weight.float() + self.vera_b[:, None] * (B * self.vera_d) @ A


@pytest.fixture(params=[*METHODS, "vera"])
def method(request, monkeypatch) -> str:
    """Each method's name. VeRA's row is there as long as the test lasts."""
    if request.param == "vera":
        monkeypatch.setitem(METHODS, "vera", Method(VeRALinear, rank=256, lr=1e-2))
    return request.param


def drops_out(method: str) -> bool:
    return bool(METHODS[method].dropout)


# --- in memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "rora", "dora", "vera"], indirect=True)
def test_training_starts_from_the_base_model(tiny, method):
    """The others start from random numbers: near the base model, or at a prefix of noise."""
    before = tiny(IDS)
    attach(tiny, method, 4, 8)
    assert torch.allclose(tiny(IDS), before, atol=1e-6)


def test_only_new_parameters_train_and_all_of_them_do(tiny, method):
    of_the_base = {name for name, _ in tiny.named_parameters()}
    attach(tiny, method, 4, 8)
    shake(tiny)
    tiny(IDS).square().mean().backward()
    moved = {name for name, p in tiny.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == trainable(tiny).keys()
    assert not {name.replace(".base", "") for name in moved} & of_the_base


def test_adapters_are_fp32_whatever_the_base(tiny, method):
    attach(tiny.bfloat16(), method, 4, 8)
    assert {p.dtype for p in trainable(tiny).values()} == {torch.float32}
    tiny(IDS).float().square().mean().backward()
    assert {p.grad.dtype for p in trainable(tiny).values()} == {torch.float32}


def test_attach_works_on_a_model_without_memory(method):
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    attach(model, method, 8)
    assert all(p.is_meta for p in trainable(model).values())


def test_a_model_with_adapters_generates_with_its_cache_as_without(tiny, method):
    attach(tiny.eval(), method, 4, 8)
    shake(tiny)
    for prompts in ([[5, 6, 7], [5, 6, 8, 6, 5, 4]], [[5, 6, 7], [9, 8, 7, 6, 5, 4]]):
        for prompt, said in zip(prompts, generate(tiny, prompts, 6, eos=-1)):
            ids = list(prompt)
            for _ in range(6):
                ids.append(tiny(torch.tensor([ids]))[0, -1].argmax().item())
            assert ids[len(prompt) :] == said


def test_merged_is_the_same_model_or_refused_with_the_reason(tiny, method):
    attach(tiny.eval(), method, 4, 8)
    shake(tiny)
    before = tiny(IDS)
    if hasattr(METHODS[method].layer, "merged_weight"):
        merge(tiny)
        assert not wrappers(tiny)
        assert torch.allclose(tiny(IDS), before, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=f"{method} cannot be merged"):
            merge(tiny)


def test_how_a_batch_is_cut_into_micro_batches_changes_nothing(tiny, method):
    generator = torch.Generator().manual_seed(2)
    records = []
    for number, (n, split) in enumerate(LENGTHS_AND_SPLITS):
        ids = torch.randint(3, 64, (n,), generator=generator).tolist()
        records.append(Record(ids, split, number))

    def three_steps(micro_batch_size):
        model = copy.deepcopy(tiny)
        torch.manual_seed(1)
        attach(model, method, 4, 8)
        optimizer, told = new_optimizer(model, 1e-2), []
        for _ in range(3):
            told.append(train_step(model, records, optimizer, 1e-2, micro_batch_size))
            optimizer.zero_grad()
        return told

    whole = three_steps(5)
    for micro_batch_size in (1, 2, 3):
        for (loss, norm), (loss_cut, norm_cut) in zip(whole, three_steps(micro_batch_size)):
            assert loss_cut == pytest.approx(loss, rel=1e-5)
            assert norm_cut == pytest.approx(norm, rel=1e-4)


# --- on disk --------------------------------------------------------------------------------------


def test_a_saved_adapter_comes_back_bit_for_bit_and_trainable(tiny, tmp_path, method):
    fresh = copy.deepcopy(tiny).eval()
    attach(tiny, method, 4, 8, dropout=0.25 if drops_out(method) else 0.0)
    shake(tiny)
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert not fresh.training
    assert trainable(fresh).keys() == trainable(tiny).keys()
    assert rora.adapter_settings(fresh) == rora.adapter_settings(tiny)
    assert torch.equal(fresh(IDS), tiny.eval()(IDS))


def test_the_same_adapter_saved_twice_is_the_same_bytes(tiny, tmp_path, method):
    attach(tiny, method, 4, 8)
    for folder in ("one", "two"):
        save_adapter(tiny, tmp_path / folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --- from the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A checkpoint, 24 records, 9 questions."""
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "toy")
    write_records(folder / "train.json", 24)
    write_records(folder / "tests" / "boolq.json", 9)
    return folder


def test_a_run_trains_saves_and_is_scored(world, tmp_path, method, capsys):
    out = tmp_path / "out"
    flags = "--rank 3 --max-steps 3 --warmup 1 --batch-size 4 --val-size 4".split()
    files = ["--ckpt", str(world / "toy"), "--data", str(world / "train.json"), "--out", str(out)]
    assert rora.main([*files, "--method", method, *flags]) == 0
    assert f"{method}: " in capsys.readouterr().out
    assert judge.main([str(out), "--data", str(world / "tests")]) == 0
    results = json.loads((out / "eval/results.json").read_text())
    assert results["tasks"]["boolq"]["n"] == 9
    assert results["merged"] == hasattr(METHODS[method].layer, "merged_weight")


# --- a method, a scale of one's own ---------------------------------------------------------------


VERA = pytest.mark.parametrize("method", ["vera"], indirect=True)


@VERA
def test_vera_is_the_formula(tiny, method):
    attach(tiny, method, 4)
    shake(tiny)
    layer, x = tiny.layers[1].self_attn.v_proj, torch.randn(5, 32)
    A, B = shared_matrices(4, 32, 16)
    W, b, d = layer.base.weight, layer.vera_b, layer.vera_d
    assert torch.allclose(layer(x), x @ (W + b.diag() @ B @ d.diag() @ A).T, atol=1e-5)


@VERA
def test_the_start_line_says_what_a_method_adds_and_that_peft_cannot_read_it(tiny, method):
    attach(tiny, method, 4)
    added = 2 * ((4 + 32) + (4 + 16))  # d and b, on q_proj and v_proj of two layers
    line = start_line(tiny, method)
    assert line.startswith(f"vera: rank 4 · {added} of ")
    assert line.endswith("saved as RORA_VERA, which PEFT does not read")


@VERA
def test_an_adapter_that_peft_cannot_read_has_a_peft_type_that_peft_does_not_know(
    tiny, tmp_path, method
):
    attach(tiny, method, 4)
    save_adapter(tiny, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "RORA_VERA"


@VERA
def test_an_adapter_whose_method_is_gone_is_refused_by_name(tiny, tmp_path, method, monkeypatch):
    fresh = copy.deepcopy(tiny)
    attach(tiny, method, 4)
    save_adapter(tiny, tmp_path)
    monkeypatch.delitem(METHODS, "vera")
    with pytest.raises(CheckpointError, match="no row for the method 'vera'"):
        load_adapter(fresh, tmp_path)
    assert trainable(fresh).keys() == dict(fresh.named_parameters()).keys()  # nothing attached


@pytest.fixture
def fourth_root(monkeypatch):
    """s = α/r^¼: one line in SCALES, a class of one line, one row."""

    class FourthRootLinear(LoRALinear):
        scale = "fourth-root"

    monkeypatch.setitem(SCALES, "fourth-root", lambda alpha, r: alpha / r**0.25)
    monkeypatch.setitem(METHODS, "fourth", Method(FourthRootLinear))


def test_a_scale_is_a_line_in_SCALES_and_comes_back_from_its_file(tiny, tmp_path, fourth_root):
    fresh = copy.deepcopy(tiny)
    attach(tiny, "fourth", 16, 8)
    shake(tiny)
    save_adapter(tiny, tmp_path)
    load_adapter(fresh, tmp_path)
    assert {layer.scaling for layer in wrappers(fresh).values()} == {8 / 2}
    assert torch.equal(fresh(IDS), tiny(IDS))


def test_the_flag_scale_finds_the_method_that_has_it(world, tmp_path, fourth_root, capsys):
    files = ["--ckpt", str(world / "toy"), "--data", str(world / "train.json")]
    flags = "--scale fourth-root --rank 16 --max-steps 2 --warmup 0 --val-size 0".split()
    assert rora.main([*files, *flags, "--out", str(tmp_path / "out")]) == 0
    assert "fourth: s = 32 (fourth-root)" in capsys.readouterr().out
