"""llama.py against transformers' LLaMA, on small random checkpoints that transformers wrote."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import rora
from data import format_prompt, load_tokenizer
from llama import LlamaConfig, RopeScaling, generate, load_llama, rope_frequencies, save_llama

pytestmark = pytest.mark.crosscheck

FILES = {
    "one safetensors": "model.safetensors",
    "safetensors shards": ("model.safetensors", 60_000),
    "one bin": "pytorch_model.bin",
    "bin shards": ("pytorch_model.bin", 60_000),
}


def some_ids(vocab_size: int = 320, B: int = 3, T: int = 40) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["plain", "grouped", "one-group"])
def test_fp32_logits_are_those_of_transformers(
    kv_heads, eps, theta, files, tied, make_llama, deviation
):
    folder, theirs = make_llama(
        FILES[files],
        rope_theta=theta,
        rms_norm_eps=eps,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    ids = some_ids()
    with torch.no_grad():
        logits = theirs(ids).logits
        ours = load_llama(folder, dtype=torch.float32)(ids)
    assert 0.3 < logits.std() < 3
    absolute, _ = deviation("logits, fp32", "transformers", ours, logits)
    assert absolute < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 5e5},
        {"num_key_value_heads": 2},
        {"scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
    ids=str,
)
def test_the_comparison_would_notice_another_config(change, make_llama):
    """The same seed draws the same weights, but for narrower k and v: only the config differs."""
    (_, one), (_, other) = make_llama(), make_llama(**change)
    with torch.no_grad():
        assert (one(some_ids()).logits - other(some_ids()).logits).abs().max() > 1e-3


# --- positions beyond the first length, as Llama 3.1 and 3.2 have them ----------------------------

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def in_the_spelling_of_transformers_4(folder) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_1 | {"factor": 32.0}, LINEAR], ids=str)
def test_scaled_rotary_positions_are_those_of_transformers_also_beyond_the_first_length(
    scaling, spelling, make_llama, deviation
):
    folder, theirs = make_llama(
        scaling=scaling,
        rope_theta=5e5,
        num_key_value_heads=2,
        head_dim=32,
        num_attention_heads=4,
        hidden_size=128,
        max_position_embeddings=512,
    )
    if spelling == 4:
        in_the_spelling_of_transformers_4(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = some_ids(B=2, T=300)  # the first length is 64
    with torch.no_grad():
        logits = theirs(ids).logits
        ours = load_llama(folder, dtype=torch.float32)(ids)
    absolute, _ = deviation(
        f"logits, fp32, rope {scaling['rope_type']}", "transformers", ours, logits
    )
    assert absolute < 1e-5


@pytest.mark.parametrize("scaling", [LLAMA_3_1, LINEAR], ids=["llama3", "linear"])
def test_a_scaling_that_save_llama_writes_transformers_reads(scaling, make_llama, tmp_path):
    folder, theirs = make_llama(scaling=scaling, max_position_embeddings=512)
    save_llama(load_llama(folder, dtype=torch.float32), tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = some_ids(B=1, T=200)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


PUBLISHED = {  # hidden, layers, heads, key/value heads, F, V, tied, factor
    "Llama-3.1-8B": (4096, 32, 32, 8, 14336, 128256, False, 8.0),
    "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 128256, True, 32.0),
    "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128256, True, 32.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_scaling_has_the_frequencies_of_transformers_at_full_width(name):
    hidden, layers, heads, kv_heads, F, V, tied, factor = PUBLISHED[name]
    rope = LLAMA_3_1 | {"factor": factor, "original_max_position_embeddings": 8192}
    theirs = TheirConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131072,
        rope_parameters=rope | {"rope_theta": 5e5},
    )
    cfg = LlamaConfig(
        *(hidden, layers, heads, kv_heads, F, V, 1e-5, 5e5, 131072, tied),
        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
    )
    torch.testing.assert_close(
        rope_frequencies(cfg), LlamaRotaryEmbedding(theirs).inv_freq, rtol=3e-7, atol=0
    )


def test_bf16_error_against_float64_is_not_above_that_of_transformers(make_llama, deviation):
    ours_squared = theirs_squared = 0.0
    for seed in range(4):
        folder, _ = make_llama(seed=seed, num_key_value_heads=2, num_hidden_layers=4)
        ids = some_ids(B=4, T=128)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.no_grad():
            in_bf16, ours = theirs(ids).logits, load_llama(folder, dtype=torch.bfloat16)(ids)
            exact = theirs.double()(
                ids
            ).logits  # the rounded weights, computed without further rounding
        deviation("logits, bf16", "transformers in float64", ours, exact)
        deviation("logits, bf16, transformers' own", "transformers in float64", in_bf16, exact)
        ours_squared += (ours.double() - exact).square().mean()
        theirs_squared += (in_bf16.double() - exact).square().mean()
    assert ours_squared <= theirs_squared


def test_what_save_llama_writes_transformers_loads_to_the_same_logits(
    make_llama, tmp_path, deviation
):
    for tied in (False, True):
        folder, theirs = make_llama(
            num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=tied
        )
        save_llama(load_llama(folder, dtype=torch.float32), tmp_path / f"saved-{tied}")
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"saved-{tied}", dtype=torch.float32
        )
        with torch.no_grad():
            absolute, _ = deviation(
                "logits of a folder by save_llama",
                "transformers",
                again(some_ids()).logits,
                theirs(some_ids()).logits,
            )
        assert absolute < 1e-5


# --- greedy decoding ------------------------------------------------------------------------------

NEW = 24


@pytest.fixture
def prompts(data_folder, records) -> list[list[int]]:
    """Eight of each task, as LLaMA's tokenizer has them: 56 of mixed length."""
    tokenizer = load_tokenizer(data_folder)
    chosen = [
        r
        for name, task in records.items()
        if name.startswith("eval/")
        for r in task[:: len(task) // 8][:8]
    ]
    return [tokenizer.encode(format_prompt(r), bos=True, eos=False) for r in chosen]


def transformers_greedy(model, prompts: list[list[int]], eos: int) -> list[list[int]]:
    """Left-padded, under an attention mask; cut before the eos."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=eos,
    )[:, T:].tolist()
    return [row[: row.index(eos)] if eos in row else row for row in out]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["plain", "grouped"])
def test_greedy_tokens_are_those_of_transformers_on_real_prompts(
    kv_heads, prompts, make_llama, mismatches
):
    folder, theirs = make_llama(vocab_size=32000, num_key_value_heads=kv_heads)
    ours = load_llama(folder, dtype=torch.float32)
    assert len(prompts) >= 50 and len({len(p) for p in prompts}) > 20
    expected = [
        row
        for i in range(0, len(prompts), 14)
        for row in transformers_greedy(theirs, prompts[i : i + 14], eos=2)
    ]
    alone = [transformers_greedy(theirs, [p], eos=2)[0] for p in prompts[::7]]
    assert (
        alone == expected[::7]
    )  # their padding changes nothing here: the truth is the same either way
    for rows_at_once in (56, 5):
        got = [
            row
            for i in range(0, len(prompts), rows_at_once)
            for row in generate(ours, prompts[i : i + rows_at_once], max_new=NEW, eos=2)
        ]
        assert (
            mismatches(
                f"greedy tokens, {rows_at_once} prompts at once", "transformers", zip(got, expected)
            )
            == 0
        )


def test_generation_stops_at_the_eos_where_transformers_stops(prompts, make_llama, mismatches):
    """A token that the model does say serves as eos: rows end at different steps, some at none."""
    folder, theirs = make_llama(vocab_size=32000)
    said = [token for row in transformers_greedy(theirs, prompts[:20], eos=2) for token in row[4:]]
    eos = max(set(said), key=said.count)
    expected = transformers_greedy(theirs, prompts[:20], eos)
    assert len({len(row) for row in expected}) > 2
    got = generate(load_llama(folder, dtype=torch.float32), prompts[:20], max_new=NEW, eos=eos)
    assert mismatches("greedy tokens up to an eos", "transformers", zip(got, expected)) == 0


# --- checkpoints that people have -----------------------------------------------------------------


@pytest.mark.parametrize("tied, factor", [(False, 8.0), (True, 32.0)], ids=["3.1", "3.2"])
def test_a_small_llama_3_1_or_3_2_trained_and_merged_here_has_the_same_logits_there(
    tied, factor, make_llama, data_folder, records, tmp_path, deviation
):
    folder, _ = make_llama(
        scaling=LLAMA_3_1 | {"factor": factor},
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        num_key_value_heads=2,
        vocab_size=128256,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    shutil.copyfile(data_folder / "llama3/tokenizer.model", folder / "tokenizer.model")
    (tmp_path / "train.json").write_text(json.dumps(records["train/boolq"][:12]))
    flags = {"--ckpt": folder, "--data": tmp_path / "train.json", "--out": tmp_path / "run"}
    flags |= {"--rank": 4, "--max-steps": 3, "--warmup": 1, "--batch-size": 4, "--val-size": 4}
    assert rora.main([str(word) for flag in flags.items() for word in flag]) == 0
    assert rora.main(["--merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    ids = some_ids(vocab_size=128256, B=1, T=200)  # the first length is 64
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(ids).logits
        ours = load_llama(tmp_path / "merged", dtype=torch.float32)(ids)
        base = load_llama(folder, dtype=torch.float32)(ids)
    assert (logits - base).abs().max() > 1e-4
    absolute, _ = deviation("logits, fp32, Llama 3.1 and 3.2, merged", "transformers", ours, logits)
    assert absolute < 1e-5


def test_a_real_pretrained_model_has_the_logits_and_the_greedy_tokens_of_transformers(
    smollm2, records, deviation, mismatches
):
    """SmolLM2-135M-Instruct from config.json, model.safetensors and tokenizer.json alone."""
    ours = load_llama(smollm2, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = load_tokenizer(smollm2)
    chosen = [r for task in records.values() for r in task[:: len(task) // 2][:2]]
    texts = ["The capital of France is", *map(format_prompt, chosen[:8])]
    prompts = [tokenizer.encode(text, bos=True, eos=False) for text in texts]
    with torch.no_grad():
        for ids in prompts:
            logits = theirs(torch.tensor([ids])).logits
            name = "logits, fp32, SmolLM2-135M"
            _, relative = deviation(name, "transformers", ours(torch.tensor([ids])), logits)
            assert relative < 1e-5
    expected = [transformers_greedy(theirs, [ids], eos=tokenizer.eos)[0] for ids in prompts]
    got = generate(ours, prompts, max_new=NEW, eos=tokenizer.eos)
    assert "Paris" in tokenizer.decode(got[0])
    assert mismatches("greedy tokens, SmolLM2-135M", "transformers", zip(got, expected)) == 0
