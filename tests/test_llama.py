"""What a LLaMA is, one claim per test."""

import cmath
import dataclasses
import json

import pytest
import torch
from conftest import SMALL

from llama import (
    Attention,
    KVCache,
    Llama,
    LlamaConfig,
    RMSNorm,
    Rows,
    apply_rope,
    attend,
    generate,
    rope_frequencies,
    rope_tables,
    sdpa,
)
from plumbing.hf_files import CheckpointError

IDS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))
FREQS_OF_8 = rope_frequencies(SMALL)  # of heads 8 wide


def test_rmsnorm_is_x_over_its_root_mean_square_times_a_weight():
    norm = RMSNorm(16, eps=1e-6)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 16) * 7
    x64, weight = x.double(), norm.weight.double()
    exact = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert torch.allclose(norm(x).double(), exact, rtol=1e-6, atol=1e-6)


def test_rope_turns_each_pair_by_position_times_frequency():
    D, theta, t = 8, 10000.0, 37
    x = torch.randn(1, 1, D, dtype=torch.float64)
    turned = apply_rope(x, *rope_tables(torch.tensor([t]), FREQS_OF_8)).double()
    for d in range(D // 2):  # the pair (d, d + D/2) as one complex number
        pair = complex(x[0, 0, d], x[0, 0, d + D // 2])
        z = pair * cmath.exp(1j * t * theta ** (-2 * d / D))
        assert turned[0, 0, d].item() == pytest.approx(z.real, abs=1e-5)
        assert turned[0, 0, d + D // 2].item() == pytest.approx(z.imag, abs=1e-5)


def test_rope_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 8)
    at = lambda x, t: apply_rope(x, *rope_tables(torch.tensor([t]), FREQS_OF_8))
    score = lambda i, j: (at(q, i) * at(k, j)).sum()
    assert torch.allclose(score(7, 3), score(57, 53), atol=1e-5)  # four apart, either way
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-3)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_the_textbook_formula_with_each_key_head_serving_its_group(groups):
    cfg = dataclasses.replace(SMALL, n_kv_heads=groups)
    model, T, D = Llama(cfg), 6, cfg.head_dim
    attn, x = Attention(cfg), torch.randn(T, 32)
    rows = model.rows([T])
    q = apply_rope(attn.q_proj(x).view(T, 4, D), rows.cos, rows.sin)
    k = apply_rope(attn.k_proj(x).view(T, groups, D), rows.cos, rows.sin)
    v = attn.v_proj(x).view(T, groups, D)
    heads = []
    for h in range(4):
        g = h // (4 // groups)
        scores = (q[:, h] @ k[:, g].T) / D**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, g])
    assert torch.allclose(attn(x, rows), attn.o_proj(torch.cat(heads, dim=1)), atol=1e-6)


def test_a_token_cannot_see_the_future(tiny):
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 64
    assert torch.allclose(tiny(IDS)[:, :6], tiny(changed)[:, :6], atol=1e-6)


def test_rows_of_a_stream_do_not_see_each_other(tiny):
    """Laid end to end, without padding, every row gets what it would get alone."""
    lengths = [9, 4, 6]
    stream = torch.cat([row[:n] for row, n in zip(IDS, lengths)])
    together = tiny.lm_head(tiny.hidden(stream, tiny.rows(lengths))).split(lengths)
    for row, n, logits in zip(IDS, lengths, together):
        assert torch.allclose(logits, tiny(row[None, :n])[0], atol=1e-5)


def test_loss_and_gradients_of_a_stream_are_those_of_the_padded_batch(tiny):
    lengths = [9, 4, 6]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]  # (B, T)
    padded = tiny(IDS.where(real, 0))[real].square().sum()
    padded.backward()
    expected = {n: p.grad.clone() for n, p in tiny.named_parameters()}
    tiny.zero_grad()
    flat = tiny.lm_head(tiny.hidden(IDS[real], tiny.rows(lengths))).square().sum()
    flat.backward()
    assert torch.allclose(flat, padded)
    for name, p in tiny.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-4), name


def test_checkpointed_blocks_give_the_same_gradients(tiny):
    def gradients(blocks):
        tiny.zero_grad()
        hidden = tiny.hidden(IDS.flatten(), tiny.rows([9, 9, 9]), checkpoint_blocks=blocks)
        hidden.square().sum().backward()
        return [p.grad.clone() for p in tiny.parameters() if p.grad is not None]

    plain = gradients(0)
    for blocks in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(blocks)))


def plain_greedy(model, prompt, max_new, eos):
    """The whole text again for every token, no cache, no batch."""
    ids = list(prompt)
    for _ in range(max_new):
        token = model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == eos:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_generation_with_a_cache_says_what_the_whole_text_says(tiny):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], list(range(20, 45))]
    assert generate(tiny, prompts, 12, eos=-1) == [plain_greedy(tiny, p, 12, -1) for p in prompts]


@pytest.mark.parametrize(
    "own",
    [[[5, 6, 7], [9], [5, 6, 1, 2]], [[7], [7, 8], [7]], [[7]] * 3],
    ids=["differ", "one ends", "equal"],
)
def test_what_all_prompts_begin_with_goes_through_the_model_once(tiny, own, monkeypatch):
    """Four tokens here; then the rest of each. What is said stays the same."""
    prompts = [[1, 4, 9, 3, *rest] for rest in own]
    tokens_passed = []
    hidden = Llama.hidden

    def watched(model, ids, *rest, **asked):
        tokens_passed.append(len(ids))
        return hidden(model, ids, *rest, **asked)

    monkeypatch.setattr(Llama, "hidden", watched)
    generate(tiny, prompts, 1, eos=-1)
    assert tokens_passed == [4, sum(map(len, own))]
    said = generate(tiny, prompts, 8, eos=-1)
    monkeypatch.undo()
    assert said == [plain_greedy(tiny, p, 8, -1) for p in prompts]


def test_rows_behind_a_past_get_what_each_gets_behind_it_alone():
    P, lengths = 5, [4, 1, 6]
    positions = torch.arange(sum(lengths))
    rows = Rows(lengths, positions, rope_tables(positions, FREQS_OF_8))
    q, k, v = torch.randn(11, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    past_q, past_k, past_v = torch.zeros(P, 4, 8), torch.randn(P, 2, 8), torch.randn(P, 2, 8)
    alone = []
    for row_q, row_k, row_v in zip(*(x.split(lengths) for x in (q, k, v))):
        row = Rows([P + len(row_q)], torch.arange(P + len(row_q)), (None, None))
        whole = [torch.cat(x) for x in ((past_q, row_q), (past_k, row_k), (past_v, row_v))]
        alone.append(attend(*whole, row)[P:])
    past = past_k.transpose(0, 1), past_v.transpose(0, 1)
    assert torch.allclose(attend(q, k, v, rows, past), torch.cat(alone), atol=1e-6)


@pytest.mark.parametrize("groups", [4, 2])
def test_plain_products_against_the_cache_are_the_fused_attention(groups):
    attn = Attention(dataclasses.replace(SMALL, n_kv_heads=groups))
    positions = torch.tensor([2, 9, 5])
    rows = Rows([1, 1, 1], positions, rope_tables(positions, FREQS_OF_8), decoding=11)
    q, (keys, values) = torch.randn(3, 4, 8), torch.randn(2, 3, groups, 11, 8)
    visible = torch.arange(11) <= positions[:, None]
    fused = sdpa(q[:, :, None], keys, values, visible[:, None, None])[:, :, 0]
    assert torch.allclose(attn.decode(q, rows, keys, values), fused, atol=1e-6)


def test_a_row_in_a_batch_says_what_it_says_alone(tiny):
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1, 2]]
    assert generate(tiny, prompts, 8, eos=2) == [generate(tiny, [p], 8, eos=2)[0] for p in prompts]


def test_a_row_ends_at_its_own_eos_and_leaves_it_out(tiny):
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    endless = generate(tiny, prompts, 8, eos=-1)
    eos = endless[0][3]
    up_to_eos = [row[: row.index(eos)] if eos in row else row for row in endless]
    assert generate(tiny, prompts, 8, eos=eos) == up_to_eos


def test_generation_stops_when_every_row_has_ended(tiny, monkeypatch):
    passes = []
    hidden = Llama.hidden
    monkeypatch.setattr(Llama, "hidden", lambda *a, **k: passes.append(1) or hidden(*a, **k))
    first = generate(tiny, [[5, 6, 7]], 1, eos=-1)[0][0]
    passes.clear()
    assert generate(tiny, [[5, 6, 7]] * 3, 20, eos=first) == [[], [], []]
    assert len(passes) == 2  # what they all begin with, and the rest


def test_an_empty_prompt_is_refused_and_no_prompts_are_no_answers(tiny):
    assert generate(tiny, [], 4, eos=2) == []
    with pytest.raises(ValueError, match="empty prompt"):
        generate(tiny, [[5], []], 4, eos=2)


def test_the_cache_is_allocated_once(tiny):
    cache = KVCache(tiny, B=3, S=11)
    assert len(cache.layers) == 2  # L
    assert all(x.shape == (3, 2, 11, 8) for layer in cache.layers for x in layer)  # (B, G, S, D)


def test_padding_the_rows_and_back_is_the_identity():
    positions = torch.arange(7)
    rows = Rows([3, 1, 3], positions, rope_tables(positions, torch.tensor([1.0, 0.01])))
    x = torch.randn(7, 2, 4)
    assert rows.pad(x).shape == (3, 2, 3, 4)
    assert torch.equal(rows.unpad(rows.pad(x)), x)


# --- config.json ----------------------------------------------------------------------------------

OLD = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
}


def read(tmp_path, **changes):
    """A LLaMA-1 config with some keys changed, or "absent"."""
    config = {key: value for key, value in (OLD | changes).items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return LlamaConfig.from_json(tmp_path / "config.json")


def test_llama_1_configs_lack_keys_that_have_since_been_added(tmp_path):
    cfg = read(tmp_path)
    assert (cfg.n_kv_heads, cfg.rope_theta, cfg.tie_embeddings) == (4, 1e4, False)


def test_transformers_4_and_5_spell_the_same_facts_differently(tmp_path):
    old = read(tmp_path, rope_theta=5e5, rope_scaling=None, torch_dtype="float16")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    new = read(tmp_path, rope_parameters=rope, dtype="float16")
    assert old == new
    assert new.rope_theta == 5e5


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "factor"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 20}, "head_dim"),
        ({"num_attention_heads": 5}, "no multiple"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, **changes)


def test_a_config_survives_being_written_and_read(tmp_path):
    cfg = dataclasses.replace(
        SMALL, norm_eps=1e-5, rope_theta=5e5, tie_embeddings=True, bos=128000, eos=128001
    )
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json(torch.float16)))
    assert LlamaConfig.from_json(tmp_path / "config.json") == cfg
