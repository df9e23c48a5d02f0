"""rora.py's adapters against PEFT's from the same files; Series, Parallel against formulas."""

import json
import re
import shutil
from array import array

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data import Record, collate
from llama import generate, load_llama
from rora import attach, load_adapter, loss_sum, main, merge, save_adapter, trainable

pytestmark = pytest.mark.crosscheck

# What attach() is told -> what PEFT is told.
LORA_FAMILY = {
    "lora": ({"method": "lora"}, {"use_rslora": False, "use_dora": False}),
    "rora": ({"method": "rora"}, {"use_rslora": True, "use_dora": False}),
    "dora": ({"method": "dora"}, {"use_rslora": False, "use_dora": True}),
    "dora-sqrt": ({"method": "dora", "scale": "sqrt"}, {"use_rslora": True, "use_dora": True}),
}
RANK, ALPHA, PREFIX = 6, 9.0, 5
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_NAMES = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def peft_name(ours: str) -> str:
    layer, _, parameter = ours.rpartition(".")
    return f"base_model.model.model.{layer}.{PEFT_NAMES[parameter]}"


def shake(parameters, size: float = 0.1) -> None:
    """Away from the start, where lora_B = 0 makes every adapter alike."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in parameters:
            p.add_(size * torch.randn(p.shape, generator=generator))


def our_model(folder, **how):
    """Our base in fp32 with a shaken adapter."""
    model = load_llama(folder, dtype=torch.float32)
    torch.manual_seed(0)
    attach(model, **({"rank": RANK, "alpha": ALPHA} | how))
    shake(trainable(model).values())
    return model


def some_ids(B: int = 2, T: int = 21, vocab_size: int = 320) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(5))


def some_records() -> list[Record]:
    """Rows of unequal length; of one, only the end is learned."""
    return [
        Record(array("i", row[:n].tolist()), split, 0)
        for row, n, split in zip(some_ids(4, 40), (17, 40, 9, 26), (1, 1, 1, 20))
    ]


def our_loss(model, records: list[Record]) -> torch.Tensor:
    batch = collate(records)
    return loss_sum(model, batch) / batch.learned


# --- loss and gradients from one adapter file -----------------------------------------------------


def compare_with_peft(case: str, make_llama, padded, tmp_path, deviation) -> None:
    how, flags = LORA_FAMILY[case]
    folder, base = make_llama(num_key_value_heads=2)
    ours = our_model(folder, targets=EVERY_LINEAR, **how)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert {key: getattr(theirs.peft_config["default"], key) for key in flags} == flags

    loss, their = our_loss(ours, some_records()), theirs(**padded(some_records())).loss
    assert deviation(f"{case}: loss", "PEFT", loss, their)[1] < 1e-5
    loss.backward()
    their.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert {peft_name(name) for name in trainable(ours)} == gradients.keys()
    for name, p in trainable(ours).items():
        kind = name.rpartition(".")[2]
        assert (
            deviation(f"{case}: gradient of {kind}", "PEFT", p.grad, gradients[peft_name(name)])[1]
            < 1e-5
        ), name


def test_lora_has_pefts_loss_and_every_gradient(make_llama, padded, tmp_path, deviation):
    compare_with_peft("lora", make_llama, padded, tmp_path, deviation)


def test_rora_and_pefts_rslora_are_one_formula_in_loss_and_every_gradient(
    make_llama, padded, tmp_path, deviation
):
    compare_with_peft("rora", make_llama, padded, tmp_path, deviation)


@pytest.mark.parametrize("case", ["dora", "dora-sqrt"])
def test_dora_has_pefts_loss_and_every_gradient(case, make_llama, padded, tmp_path, deviation):
    compare_with_peft(case, make_llama, padded, tmp_path, deviation)


def as_prompt_embeddings(tensors: dict) -> torch.Tensor:
    """Ours, (G, P, D) a layer for keys and for values, as PEFT's one (P, L·2·G·D)."""
    rows = [
        tensors[f"layers.{i}.self_attn.prefix_{kv}"].transpose(0, 1)
        for i in range(len(tensors) // 2)
        for kv in "kv"
    ]
    return torch.stack(rows, dim=1).flatten(1)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["plain", "grouped"])
def test_prefix_tuning_has_pefts_loss_and_gradient(
    kv_heads, make_llama, padded, tmp_path, deviation
):
    folder, base = make_llama(num_key_value_heads=kv_heads)
    ours = our_model(folder, method="prefix", rank=PREFIX)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(
        base, tmp_path / "adapter"
    )  # PEFT refuses is_trainable=True for a saved prefix
    embedding = theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    loss, their = our_loss(ours, some_records()), theirs(**padded(some_records())).loss
    assert deviation("prefix: loss", "PEFT", loss, their)[1] < 1e-5
    loss.backward()
    their.backward()
    gradient = as_prompt_embeddings({name: p.grad for name, p in trainable(ours).items()})
    assert deviation("prefix: gradient", "PEFT", gradient, embedding.grad)[1] < 1e-5


def test_greedy_tokens_behind_a_prefix_are_pefts(make_llama, tmp_path, mismatches):
    folder, base = make_llama(num_key_value_heads=2)
    ours = our_model(folder, method="prefix", rank=PREFIX)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    prompts = [list(r.ids) for r in some_records()]
    expected = [
        theirs.generate(
            input_ids=torch.tensor([p]),
            attention_mask=torch.ones(1, len(p), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=319,
            pad_token_id=0,
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    expected = [row[: row.index(319)] if 319 in row else row for row in expected]
    got = generate(ours, prompts, max_new=16, eos=319)
    assert mismatches("greedy tokens behind a prefix", "PEFT", zip(got, expected)) == 0


@pytest.mark.parametrize(
    "method, targets", [("series", ["down_proj"]), ("parallel", ["up_proj", "down_proj"])]
)
def test_bottlenecks_are_what_their_formula_says(method, targets, make_llama, padded, deviation):
    """f(h) = up tanh(down h), as hooks on transformers' model: series y = z + f(z) with z = W x,
    parallel y = W x + f(x)."""
    folder, theirs = make_llama(num_key_value_heads=2)
    ours = our_model(folder, method=method, rank=8)
    weights = {name: p.detach().clone().requires_grad_() for name, p in trainable(ours).items()}
    assert {name.split(".")[-2] for name in weights} == set(targets)
    theirs.requires_grad_(False)
    for name, module in theirs.model.named_modules():
        if name.endswith(tuple(targets)):
            down, up = weights[f"{name}.adapter_down"], weights[f"{name}.adapter_up"]
            module.register_forward_hook(
                lambda _, x, z, down=down, up=up: (
                    z + torch.tanh((z if method == "series" else x[0]) @ down.T) @ up.T
                )
            )
    loss, their = our_loss(ours, some_records()), theirs(**padded(some_records())).loss
    assert deviation(f"{method}: loss", "its formula on transformers", loss, their)[1] < 1e-5
    loss.backward()
    their.backward()
    for name, p in trainable(ours).items():
        assert (
            deviation(
                f"{method}: gradients", "its formula on transformers", p.grad, weights[name].grad
            )[1]
            < 1e-5
        ), name


# --- adapters out ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*LORA_FAMILY, "prefix"])
def test_what_we_save_peft_loads_to_the_same_logits(case, make_llama, tmp_path, deviation):
    how = LORA_FAMILY[case][0] if case in LORA_FAMILY else {"method": "prefix", "rank": PREFIX}
    folder, base = make_llama(num_key_value_heads=2)
    ours = our_model(folder, **how)
    save_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        without = base(some_ids()).logits
        theirs = (
            PeftModel.from_pretrained(base, tmp_path / "adapter")
            .eval()(input_ids=some_ids())
            .logits
        )
        assert (theirs - without).abs().max() > 0.01
        absolute, _ = deviation(
            f"{case}: logits of our adapter file", "PEFT", ours(some_ids()), theirs
        )
    assert absolute < 1e-5


# --- adapters in ----------------------------------------------------------------------------------


def peft_adapter(base, config, folder) -> torch.Tensor:
    """PEFT makes, shakes and saves an adapter; returns its logits."""
    theirs = get_peft_model(base, config).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(folder)
    with torch.no_grad():
        return theirs(input_ids=some_ids()).logits


def logits_here(base_folder, adapter_folder) -> torch.Tensor:
    model = load_llama(base_folder, dtype=torch.float32).eval()
    load_adapter(model, adapter_folder)
    with torch.no_grad():
        return model(some_ids())


def as_bin(folder) -> dict:
    """Turn adapter_model.safetensors into adapter_model.bin, the older of PEFT's two files."""
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    return state


@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("case", LORA_FAMILY)
def test_what_peft_saves_loads_here_to_the_same_logits(case, file, make_llama, tmp_path, deviation):
    folder, base = make_llama(num_key_value_heads=2)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=9,
        lora_dropout=0.1,
        target_modules=EVERY_LINEAR,
        **LORA_FAMILY[case][1],
    )
    logits = peft_adapter(base, config, tmp_path / "adapter")
    if file == "bin":
        as_bin(tmp_path / "adapter")
    assert (
        deviation(
            f"{case}: logits of PEFT's adapter file",
            "PEFT",
            logits_here(folder, tmp_path / "adapter"),
            logits,
        )[0]
        < 1e-5
    )


@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_prefix_that_peft_saves_loads_here_to_the_same_logits(
    file, make_llama, tmp_path, deviation
):
    folder, base = make_llama(num_key_value_heads=2)
    logits = peft_adapter(
        base,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX),
        tmp_path / "adapter",
    )
    if file == "bin":
        as_bin(tmp_path / "adapter")
    assert (
        deviation(
            "prefix: logits of PEFT's adapter file",
            "PEFT",
            logits_here(folder, tmp_path / "adapter"),
            logits,
        )[0]
        < 1e-5
    )


def test_doras_magnitude_loads_in_each_spelling(make_llama, tmp_path, deviation):
    """PEFT's, PEFT's with .weight, NVlabs' own: another name, a column, another config, a .bin."""
    folder, base = make_llama(num_key_value_heads=2)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=9,
        use_dora=True,
        target_modules=["q_proj", "up_proj"],
    )
    logits = peft_adapter(base, config, tmp_path / "peft")
    spelled = {"dotted": "lora_magnitude_vector.weight", "nvlabs": "weight_m_wdecomp.weight"}
    for kind, spelling in spelled.items():
        shutil.copytree(tmp_path / "peft", tmp_path / kind)
        state = as_bin(tmp_path / kind)
        state = {
            re.sub(r"lora_magnitude_vector(\.weight)?$", spelling, name): t
            for name, t in state.items()
        }
        if kind == "nvlabs":
            state = {name: t[:, None] if spelling in name else t for name, t in state.items()}
            (tmp_path / kind / "adapter_config.json").write_text(
                json.dumps(
                    {
                        "base_model_name_or_path": "yahma/llama-7b-hf",
                        "bias": "none",
                        "dora_simple": True,
                        "enable_lora": None,
                        "fan_in_fan_out": False,
                        "inference_mode": True,
                        "lora_alpha": 9,
                        "lora_dropout": 0.05,
                        "merge_weights": False,
                        "modules_to_save": None,
                        "peft_type": "DORA",
                        "r": RANK,
                        "target_modules": ["q_proj", "up_proj"],
                        "task_type": "CAUSAL_LM",
                        "Wdecompose_target_modules": None,
                    }
                )
            )
        assert sum(spelling in name for name in state) == 4
        torch.save(state, tmp_path / kind / "adapter_model.bin")
    for kind in ("peft", *spelled):
        absolute, _ = deviation(
            "dora: logits, each spelling of the magnitude",
            "PEFT",
            logits_here(folder, tmp_path / kind),
            logits,
        )
        assert absolute < 1e-5, kind


def test_an_adapter_exported_with_a_plain_scale_needs_no_rslora_flag(
    make_llama, tmp_path, deviation
):
    """For readers that always divide by r: alpha·√r in place of alpha, and use_rslora is false."""
    folder, base = make_llama(num_key_value_heads=2)
    ours = our_model(folder, method="rora")
    save_adapter(ours, tmp_path / "adapter")
    assert (
        main(
            [
                "--merge",
                str(tmp_path / "adapter"),
                "--export-scale",
                "plain",
                "--ckpt",
                str(folder),
                "--out",
                str(tmp_path / "plain"),
            ]
        )
        == 0
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "plain").eval()
    assert not theirs.peft_config["default"].use_rslora
    with torch.no_grad():
        absolute, _ = deviation(
            "rora: logits with --export-scale plain",
            "PEFT",
            ours(some_ids()),
            theirs(input_ids=some_ids()).logits,
        )
    assert absolute < 1e-5


# --- merging and tracing, from the command line ---------------------------------------------------


@pytest.fixture
def records_file(records, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records["train/boolq"][:12]))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["rora", "dora"])
def test_a_merged_run_has_the_unmerged_logits_in_transformers(
    method, dtype, make_base, records_file, tmp_path, deviation
):
    """Within rounding: a bf16 base's merged weights are rounded once more, by up to 2^-9."""
    folder, base = make_base()
    base.to(dtype).save_pretrained(folder)
    run, out = tmp_path / "run", tmp_path / "merged"
    assert (
        main(
            [
                "--ckpt",
                str(folder),
                "--data",
                str(records_file),
                "--method",
                method,
                "--rank",
                "8",
                "--lr",
                "2e-2",
                "--warmup",
                "0",
                "--max-steps",
                "4",
                "--batch-size",
                "4",
                "--val-size",
                "0",
                "--device",
                "cpu",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    assert main(["--merge", str(run), "--out", str(out)]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == dtype
    ours = load_llama(folder, dtype=torch.float32).eval()
    ids = some_ids(vocab_size=32000)
    with torch.no_grad():
        before = ours(ids)
        load_adapter(ours, run)
        moved = (ours(ids) - before).std()
        _, relative = deviation(
            f"{method}: logits after --merge, {str(dtype)[6:]} weights",
            "transformers",
            ours(ids),
            theirs.float()(ids).logits,
        )
    assert moved > 0.1 and relative < (1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("case", LORA_FAMILY)
def test_merged_bf16_weights_are_pefts_merged_weights(case, make_llama, tmp_path, deviation):
    folder, base = make_llama(num_key_value_heads=2)
    base.to(torch.bfloat16).save_pretrained(folder)
    ours = load_llama(folder, dtype=torch.bfloat16)
    attach(ours, rank=RANK, alpha=ALPHA, **LORA_FAMILY[case][0])
    shake(trainable(ours).values())
    save_adapter(ours, tmp_path / "adapter")
    merge(ours)
    theirs = (
        PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().model.state_dict()
    )
    for name, w in ours.state_dict().items():
        if name.endswith("_proj.weight"):
            deviation(f"{case}: weights merged into bf16", "PEFT", w, theirs[name])
            torch.testing.assert_close(
                w, theirs[name], rtol=2**-7, atol=1e-6
            )  # one step of bf16, where a tie falls
            assert (w != theirs[name]).float().mean() < 2e-3, name


@pytest.mark.parametrize("case", LORA_FAMILY)
def test_a_trace_is_what_peft_computes(case, make_base, tmp_path, deviation):
    """All that another program needs: inputs, adapter, blocks, logits, loss, gradients."""
    how, flags = LORA_FAMILY[case]
    folder, base = make_base()
    scale = ["--scale", how["scale"]] if "scale" in how else []
    assert (
        main(
            [
                "--ckpt",
                str(folder),
                "--trace",
                str(tmp_path / "t.safetensors"),
                "--method",
                how["method"],
                *scale,
                "--rank",
                str(RANK),
                "--alpha",
                str(ALPHA),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    trace = load_file(tmp_path / "t.safetensors")
    theirs = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            **flags,
        ),
    ).eval()
    parameters = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, tensor in trace.items():
            if name.startswith("adapter."):
                parameters[peft_name(name.removeprefix("adapter."))].copy_(tensor)
    blocks = {}
    for i, block in enumerate(theirs.base_model.model.model.layers):
        block.register_forward_hook(lambda _, __, y, i=i: blocks.update({f"layers.{i}": y}))
    logits = theirs(input_ids=trace["ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), trace["targets"].flatten())
    loss.backward()
    expected = blocks | {"logits": logits, "loss": loss}
    expected |= {
        f"grad.{name.removeprefix('adapter.')}": parameters[
            peft_name(name.removeprefix("adapter."))
        ].grad
        for name in trace
        if name.startswith("adapter.")
    }
    assert expected.keys() == {
        name for name in trace if not name.startswith(("adapter.", "ids", "targets"))
    }
    for name, tensor in expected.items():
        kind = (
            "gradients"
            if name.startswith("grad.")
            else "blocks"
            if name.startswith("layers.")
            else name
        )
        assert deviation(f"{case}: trace, {kind}", "PEFT", trace[name], tensor)[1] < 1e-5, name
