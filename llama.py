"""LLaMA by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU, greedy decoding.

This file knows token ids. It knows nothing of text (data.py), of fine-tuning (rora.py), of how
files are laid out (plumbing/hf_files.py).

Shapes are written with one alphabet, in every file of this project:
    B  rows, i.e. sequences      T  tokens of the longest row      N  tokens of all rows together
    C  model width               F  SwiGLU width                   V  vocabulary
    H  query heads               G  key/value heads                D  head width, C / H
    L  layers                    S  places in a KV cache           P  places taken by a prefix

A batch is one flat stream of N tokens, its rows laid end to end. Everything but attention treats
each token alone, so no arithmetic is spent on padding; attention is told by a `Rows` where each row
begins.

Where precision changes (base dtype: bf16 on CUDA; fp32 or bf16 on a CPU):
    base weights, matrix products, residual stream    base dtype
    inside RMSNorm; rotary tables and rotation        fp32
    scores, softmax, weighted sum of values           fp32 on a CPU; on CUDA base dtype, sums fp32
    the same for one new token behind a cache         base dtype, the softmax fp32
    loss (rora.py)                                    fp32
    adapters, their gradients, AdamW (rora.py)        fp32; products with A and B in base dtype
"""

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fast
from plumbing.hf_config import config_json, read_config
from plumbing.hf_files import TensorFiles, write_tensors


def find_varlen_attn() -> Callable[..., Any] | None:
    """Attention over rows of different lengths without padding: CUDA only, torch >= 2.10. Elsewhere
    it is not imported: that alone would take a second."""
    if not torch.cuda.is_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


varlen_attn = find_varlen_attn()
# Its spelling of causal changed between torch 2.10 and 2.11, that of grouped heads after it.
known = inspect.signature(varlen_attn).parameters if varlen_attn else {}
VARLEN_CAUSAL = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
VARLEN_GROUPED = {"enable_gqa": True} if "enable_gqa" in known else {}


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the length that a model was first trained at are brought within it.

    Linear: every frequency is divided by `factor`. Llama 3.1's rule: a pair that turns fewer than
    `low` times within the first length is slowed down by `factor`, one that turns more than `high`
    times is left alone, and between the two the frequency is mixed.
    """

    factor: float
    low: float | None = None  # None: linear
    high: float | None = None
    original_positions: int | None = None


@dataclass(frozen=True)
class LlamaConfig:
    dim: int = 4096  # C
    n_layers: int = 32  # L
    n_heads: int = 32  # H
    n_kv_heads: int = 32  # G
    hidden_dim: int = 11008  # F
    vocab_size: int = 32000  # V
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    tie_embeddings: bool = False  # lm_head is embed_tokens
    bos: int = 1  # as config.json says; the tokenizer knows better (old conversions have 0 and 1)
    eos: int = 2
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:  # D
        return self.dim // self.n_heads

    @classmethod
    def from_json(cls, path: str | Path) -> "LlamaConfig":
        """Read a checkpoint's config.json. Raises CheckpointError for what is not computed here."""
        facts = read_config(path)
        if "rope_scaling" in facts:
            facts["rope_scaling"] = RopeScaling(**facts["rope_scaling"])
        return cls(**facts)

    def to_json(self, dtype: torch.dtype) -> dict:
        return config_json(self, dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight. Unlike LayerNorm: no mean subtracted, no bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if x.is_cuda:  # the formula below as one kernel, rounded once, not twice
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        x32 = x.float()  # squares of bf16 activations lose too many bits
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


def rope_frequencies(cfg: LlamaConfig, device: torch.device | None = None) -> Tensor:  # (D/2,)
    """Radians per position of each pair, falling from 1 towards 1 / rope_theta."""
    D, scaling = cfg.head_dim, cfg.rope_scaling
    freqs = 1.0 / cfg.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)
    if scaling is None:
        return freqs
    low, high, first_length = scaling.low, scaling.high, scaling.original_positions
    if low is None or high is None or first_length is None:
        return freqs / scaling.factor
    turns = first_length * freqs / (2 * math.pi)  # within the first length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * freqs + (1 - kept) * freqs / scaling.factor


def rope_tables(positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
    """What apply_rope multiplies with, fp32: (N,), (D/2,) -> two of (N, 1, D).

    cos and sin of position · frequency. Each of the D/2 angles stands twice, for x[d] and for
    x[d + D/2], and its sine is negative the first time.
    """
    angles = torch.outer(positions.float(), freqs)[:, None]  # (N, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotate each pair (x[d], x[d + D/2]) by its angle; q·k then depends on distance alone.

    (N, H, D) -> (N, H, D), computed in fp32 and rounded once, to `dtype`:

        y[d]       = x[d] · cos - x[d + D/2] · sin
        y[d + D/2] = x[d + D/2] · cos + x[d] · sin        that is, y = x · cos + roll(x, D/2) · sin

    The pairing is Hugging Face's. Meta's own files pair neighbours (x[2d], x[2d + 1]):
    tools/meta_to_hf.py.
    """
    return fast.Rotation.apply(x, cos, sin, dtype)


class Rows:
    """Which of N tokens belong to which of B rows, and where each token stands in its row.

    Args:
        lengths: tokens of each row, B numbers that sum to N.
        positions: (N,) each token's position, as RoPE counts it, and its place in a cache.
        rope: cos and sin at those positions.
        start: where all rows begin. Whatever lies before, every row sees the same.
        decoding: how many places of a cache are in use, when each row is one new token whose
            predecessors lie there; 0 for whole rows.
    """

    def __init__(
        self,
        lengths: list[int],
        positions: Tensor,
        rope: tuple[Tensor, Tensor],
        start: int = 0,
        decoding: int = 0,
    ):
        self.lengths, self.positions, self.start = lengths, positions, start
        self.decoding = decoding
        self.cos, self.sin = rope
        self.B, self.T = len(lengths), max(lengths)
        self.even = min(lengths) == self.T
        self.places = decoding or start + self.T  # of a cache, up to the longest row's last
        self.bounds: tuple[Tensor, Tensor] | None = None
        self.mask: Tensor | None = None
        device = positions.device
        counts = torch.tensor(lengths)
        ends = counts.cumsum(0)
        self.ends = ends.to(device)  # (B,) one past each row's last token
        self.cu_seq = F.pad(ends, (1, 0)).to(device, torch.int32)  # (B + 1,) as varlen_attn asks
        row = torch.arange(self.B).repeat_interleave(counts)  # (N,)
        column = torch.arange(len(row)) - (ends - counts)[row]  # (N,)
        self.row = row.to(device)
        self.slot = (row * self.T + column).to(device)  # (N,) place in the padded (B, T)

    def bounds_in_cache(self, S: int) -> tuple[Tensor, Tensor]:
        """What attend_in_cache tells the kernel, of a cache of S places a row: where queries begin
        and end, where keys do; two segments a row, (2 B + 1,) both."""
        if self.bounds is None:
            starts = torch.arange(0, self.B * S, S, device=self.ends.device)
            used = starts + self.positions[self.ends - 1] + 1
            keys = F.pad(torch.stack([starts, used], 1).flatten(), (0, 1), value=self.B * S)
            queries = F.pad(self.ends.repeat_interleave(2), (1, 0))  # 0, n, n, n + m, n + m, ...
            self.bounds = queries.int(), keys.int()
        return self.bounds

    def visible(self) -> Tensor:
        """What each token sees of a cache, to be added to scores: 0, or minus infinity. (T, S) for
        whole rows, alike for all; (B, 1, 1, S) for one new token each."""
        if self.mask is None:
            S, device = self.places, self.positions.device
            last = torch.arange(self.start, S, device=device)[:, None]  # (T, 1)
            if self.decoding:
                last = self.positions[:, None, None, None]  # (B, 1, 1, 1)
            hidden = torch.arange(S, device=device) > last
            self.mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
        return self.mask

    def pad(self, x: Tensor) -> Tensor:  # (N, H, D) -> (B, H, T, D)
        """Rows of equal length for kernels that need them. Zeros on the right: no earlier token can
        see them."""
        if not self.even:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.slot, x)
        return x.view(self.B, self.T, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:  # (B, H, T, D) -> (N, H, D)
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.even else x.index_select(0, self.slot)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, past: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Causal attention inside every row: softmax(q·k / √D) v.

    (N, H, D), (N, G, D), (N, G, D) -> (N, H, D). `past`: keys and values, each (G, P, D), that
    every row sees as if they stood before its first token. On CUDA all rows go through one kernel,
    on a CPU they take turns; behind a past on CUDA, and where neither is to be had, they are padded
    for the attention alone.
    """
    if can_vary(q) and past is None:
        return vary(q, k, v, rows.cu_seq, rows.cu_seq, rows.T, rows.T)
    if q.device.type == "cpu" and not rows.even:
        return attend_in_turn(q, k, v, rows, past)
    return rows.unpad(attend_evenly(rows.pad(q), rows.pad(k), rows.pad(v), past))


def attend_in_turn(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, past: tuple[Tensor, Tensor] | None
) -> Tensor:
    """attend(), row after row."""
    out = []
    for one in zip(*(x.transpose(0, 1).split(rows.lengths, dim=1) for x in (q, k, v))):
        q, k, v = (x[None] for x in one)  # (1, H, T, D), (1, G, T, D), (1, G, T, D)
        out.append(attend_evenly(q, k, v, past)[0].transpose(0, 1))
    return torch.cat(out)


def attend_evenly(q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None) -> Tensor:
    """attend() for rows of one length: (B, H, T, D), (B, G, T, D), (B, G, T, D) -> (B, H, T, D)."""
    if past is None:
        return sdpa(q, k, v, None, causal=True)
    k, v = (
        torch.cat([p.to(x.dtype).expand(x.size(0), -1, -1, -1), x], dim=2)
        for p, x in zip(past, (k, v))
    )
    return sdpa(q, k, v, causal_mask(q.size(2), k.size(2), q.device))


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:  # (T, S)
    """What the last T of S places see."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """torch's fused attention, (B, H, T, D) x (B, G, S, D) -> (B, H, T, D); each key head serves
    H / G queries."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1)
    )


def attend_in_cache(q: Tensor, keys: Tensor, values: Tensor, rows: Rows) -> Tensor:
    """Attention to what the cache holds up to each token's place, without padding, on CUDA:
    (N, H, D), two of (B, G, S, D) -> (N, H, D).

    To the kernel the cache is one flat stream of B · S places. A row's places that are in use end
    at its newest token; the unused ones behind them are a row of their own, which nothing asks for.
    """
    flat = lambda x: x.transpose(1, 2).flatten(0, 1)  # (B · S, G, D): how the cache lies in memory
    S = keys.size(2)
    return vary(q, flat(keys), flat(values), *rows.bounds_in_cache(S), max(rows.T, 2), S)


def can_vary(q: Tensor) -> bool:
    return varlen_attn is not None and q.is_cuda and q.dtype != torch.float32


def vary(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, T: int, S: int) -> Tensor:
    assert varlen_attn is not None  # can_vary(q)
    flags = dict(VARLEN_CAUSAL)
    if q.size(1) != k.size(1):
        flags |= VARLEN_GROUPED
    return varlen_attn(q, k, v, cu_q, cu_k, T, S, **flags)


class KVCache:
    """Keys and values of every layer for B rows of at most S tokens, allocated once:
    2 L of (B, G, S, D)."""

    def __init__(self, model: "Llama", B: int, S: int):
        cfg, weight = model.cfg, model.embed_tokens.weight
        G, D = cfg.n_kv_heads, cfg.head_dim

        def new() -> Tensor:
            if weight.is_cuda:  # a place's heads side by side in memory, as attend_in_cache reads
                return weight.new_empty(B, S, G, D).transpose(1, 2)
            return weight.new_empty(B, G, S, D)

        self.layers = [(new(), new()) for _ in range(cfg.n_layers)]

    def clear(self, first: int, end: int) -> None:
        """Nothing in these places: what is not seen must be finite, too."""
        for x in (x for layer in self.layers for x in layer if not can_vary(x)):
            x[:, :, first:end] = 0

    def share_first_row(self, n: int) -> None:
        """Give every row what the first has in its first n places."""
        for x in (x for layer in self.layers for x in layer):
            x[1:, :, :n] = x[:1, :, :n]

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.layers[layer]


class Attention(nn.Module):
    prefix_len = 0  # P; baselines.PrefixAttention, which wraps this class, has more

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.dim, cfg.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.dim, cfg.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * self.head_dim, cfg.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(N, C) -> (N, C), or of `only` these tokens.

        cache: this layer's keys and values, (B, G, S, D), filled here. past: as in attend(); with a
        cache, it is put into its first places.
        """
        N = x.size(0)
        dtype = x.dtype if x.is_cuda else torch.float32  # CPU kernels are quicker, and exact, in it
        rope = rows.cos, rows.sin, dtype
        q = apply_rope(self.q_proj(x).view(N, self.n_heads, -1), *rope)  # (N, H, D)
        k = apply_rope(self.k_proj(x).view(N, self.n_kv_heads, -1), *rope)  # (N, G, D)
        v = self.v_proj(x).view(N, self.n_kv_heads, -1).to(dtype)  # (N, G, D)
        if cache is None:
            y = attend(q, k, v, rows, past)
        else:
            for place, new, old in zip(cache, (k, v), past or (None, None)):
                place[rows.row, :, rows.positions] = new.to(place.dtype)
                if old is not None and not rows.decoding:
                    place[:, :, : old.size(1)] = old
            y = self.look_back(q, rows, *cache)
        if only is not None:
            y = y[only]
        return self.o_proj(y.flatten(1).to(x.dtype))

    def look_back(self, q: Tensor, rows: Rows, keys: Tensor, values: Tensor) -> Tensor:
        """Every token looks at its row's places in the cache, (B, G, S, D), up to its own:
        (N, H, D) -> (N, H, D)."""
        if can_vary(q):
            return attend_in_cache(q, keys, values, rows)
        keys, values = (x[: rows.B, :, : rows.places] for x in (keys, values))
        if rows.decoding and not q.is_cuda:
            return self.decode(q, rows, keys, values)
        mask = rows.visible().to(q.dtype)
        return rows.unpad(sdpa(rows.pad(q), keys.to(q.dtype), values.to(q.dtype), mask))

    def decode(self, q: Tensor, rows: Rows, keys: Tensor, values: Tensor) -> Tensor:
        """look_back() of one new token a row, by plain products, which read a CPU's memory faster
        than sdpa does for so few queries: (B, H, D) -> (B, H, D)."""
        q = q.view(rows.B, self.n_kv_heads, -1, self.head_dim)  # (B, G, H/G, D): sharing a key head
        q = (q * self.head_dim**-0.5).to(keys.dtype)
        scores = q @ keys.transpose(2, 3) + rows.visible()  # (B, G, H/G, S)
        return (scores.softmax(-1, torch.float32).to(values.dtype) @ values).flatten(1, 2)


class SwiGLU(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.up_proj = nn.Linear(cfg.dim, cfg.hidden_dim, bias=False)
        self.down_proj = nn.Linear(cfg.hidden_dim, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C) -> (N, C)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.mlp = SwiGLU(cfg)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:
        """(N, C) -> (N, C), or of `only` these tokens, which see all others in attention."""
        y = self.self_attn(self.input_layernorm(x), rows, cache, only)
        x = (x if only is None else x[only]) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole model. Submodules bear the names of Hugging Face's state dicts, less "model."."""

    def __init__(self, cfg: LlamaConfig):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.lm_head = nn.Linear(cfg.dim, cfg.vocab_size, bias=False)
        if cfg.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def prefix_len(self) -> int:  # P
        return cast(Block, self.layers[0]).self_attn.prefix_len

    def rows(self, lengths: list[int], shared: int = 0) -> Rows:
        """Rows that begin at position 0, or after the prefix where there is one, and after `shared`
        tokens seen by all."""
        device = self.embed_tokens.weight.device
        start = self.prefix_len + shared
        positions = torch.cat([torch.arange(start, start + n) for n in lengths]).to(device)
        return Rows(
            lengths,
            positions,
            rope_tables(positions, rope_frequencies(self.cfg, device)),
            start,
        )

    def hidden(
        self,
        ids: Tensor,
        rows: Rows,
        cache: KVCache | None = None,
        only: Tensor | None = None,
        checkpoint_blocks: int = 0,
    ) -> Tensor:
        """(N,) token ids -> (N, C), what lm_head reads; of `only` these tokens, where others are
        not asked for.

        The first `checkpoint_blocks` blocks keep their input alone and are computed again in the
        backward pass.
        """
        assert only is None or not checkpoint_blocks, "one is for answering, one for training"
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            if i < checkpoint_blocks:
                x = checkpoint(layer, x, rows, use_reentrant=False)
            else:
                asked = only if i + 1 == len(self.layers) else None
                x = layer(x, rows, cache[i] if cache is not None else None, asked)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        B, T = ids.shape
        return self.lm_head(self.hidden(ids.flatten(), self.rows([T] * B))).view(B, T, -1)


def compile_blocks(model: Llama, **how) -> None:
    """torch.compile, block by block, for all lengths at once. Attention in turn stays as it is, or
    every other number of rows would be compiled anew."""
    global attend_in_turn
    attend_in_turn = torch.compiler.disable(attend_in_turn)
    for block in model.layers:
        block.compile(dynamic=True, **how)


def common_prefix(prompts: list[list[int]]) -> int:
    """With how many tokens all of several prompts begin, leaving each at least one of its own; 0
    for a single prompt."""
    differ = (i for i, ids in enumerate(zip(*prompts)) if len(set(ids)) > 1)
    return next(differ, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


@torch.inference_mode()
def generate(
    model: Llama, prompts: list[list[int]], max_new: int, eos: int, draft: Sequence[int] = ()
) -> list[list[int]]:
    """Greedy continuations of several prompts at once, each up to its eos, which is left out.

    One pass over what all prompts begin with and one over the rest of each fill the cache; then
    each pass adds one token to every row, at that row's own position. Rows never see each other,
    and padding is never seen at all.

    draft: how an answer may well begin. It stands behind each prompt in the second pass, and is
    kept as far as it is what the model says greedily: the same answers in fewer passes. What a
    dropped token left in the cache is overwritten before it can be seen.
    """
    if not prompts or max_new < 1:
        return [[] for _ in prompts]
    if not all(prompts):
        raise ValueError("an empty prompt: give the begin token at least")
    device, draft = model.embed_tokens.weight.device, list(draft)[: max_new - 1]
    P, B, n = model.prefix_len, len(prompts), len(draft)
    lengths, shared = [len(p) for p in prompts], common_prefix(prompts)
    used = P + max(lengths) + n  # places of the cache
    cache = KVCache(model, B, used + max_new)
    cache.clear(P + min(lengths), used)
    if shared:
        model.hidden(torch.tensor(prompts[0][:shared], device=device), model.rows([shared]), cache)
        cache.share_first_row(P + shared)
    rows = model.rows([length - shared + n for length in lengths], shared)
    ids = torch.tensor([i for p in prompts for i in p[shared:] + draft], device=device)
    speaking = rows.ends[:, None] - torch.arange(n + 1, 0, -1, device=device)  # (B, n + 1)
    hidden = model.hidden(ids, rows, cache, only=speaking.flatten())
    said = greedy(model, hidden).view(B, n + 1)  # behind the prompt and behind each draft token
    right = said[:, :n] == torch.tensor(draft, device=device)  # (B, n)
    column = right.cumprod(1).sum(1)  # (B,) how much of the draft the model says itself
    out = torch.full((B, max_new), eos, device=device)  # (B, max_new)
    out[:, : n + 1] = said
    token = said.gather(1, column[:, None]).squeeze(1)  # (B,) the first of its own
    positions = P + torch.tensor(lengths, device=device) + column  # (B,) where the next token goes
    row = torch.arange(B, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    while True:
        done |= (token == eos) | (column + 1 == max_new)
        if done.all():
            ends = (column + 1).tolist()
            answers = [answer[:end] for answer, end in zip(out.tolist(), ends)]
            return [a[: a.index(eos)] if eos in a else a for a in answers]
        cache.clear(used, used + 1)
        used += 1
        rope = rope_tables(positions, rope_frequencies(model.cfg, device))
        step = Rows([1] * B, positions, rope, decoding=used)
        token = greedy(model, model.hidden(token, step, cache))
        positions, column = positions + ~done, column + ~done
        out[row, column] = torch.where(done, out[row, column], token)


def greedy(model: Llama, hidden: Tensor) -> Tensor:  # (..., C) -> (...) token ids
    return model.lm_head(hidden).float().argmax(-1)  # argmax over bf16 is slow on a CPU


def open_llama(
    folder: str | Path, tied: bool | None = None
) -> tuple[Llama, TensorFiles, dict[str, tuple[int, ...]]]:
    """(the model on the meta device, its files, the tensors to read from them). Reads headers only.

    tied: whether lm_head is embed_tokens, whatever config.json says. Raises CheckpointError when
    config, names or shapes do not fit.
    """
    cfg = LlamaConfig.from_json(Path(folder) / "config.json")
    if tied is not None:
        cfg = replace(cfg, tie_embeddings=tied)
    with torch.device("meta"):
        model = Llama(cfg)
    files = TensorFiles(folder)
    want = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if cfg.tie_embeddings and "lm_head.weight" not in files.shapes:
        del want["lm_head.weight"]
    files.require(want)
    return model, files, want


def load_llama(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
) -> Llama:
    """A model from a Hugging Face folder: config.json and *.safetensors or pytorch_model*.bin.

    Built on the meta device and filled one tensor at a time, so that host memory holds about one
    tensor. dtype None keeps the dtype on disk. Raises CheckpointError, before anything is read,
    when names or shapes do not fit.
    """
    model, files, want = open_llama(folder)
    cfg = model.cfg
    state = {name: files.read(name, device, dtype) for name in want}
    head, embedding = state.get("lm_head.weight"), state["embed_tokens.weight"]
    if cfg.tie_embeddings and head is not None and not torch.equal(head, embedding):
        # the config says tied, the file has a head of its own: the file's is what was trained
        model = open_llama(folder, tied=False)[0]
    elif cfg.tie_embeddings:
        state["lm_head.weight"] = embedding
    model.load_state_dict(state, assign=True)
    if model.cfg.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()  # dropout in adapters attached later stays off until somebody calls train()


def save_llama(model: Llama, folder: str | Path) -> None:
    """Write config.json and safetensors in Hugging Face's layout. Raises ValueError while adapters
    are attached."""
    state = model.state_dict()
    with torch.device("meta"):
        plain = Llama(model.cfg).state_dict()
    if state.keys() != plain.keys():
        raise ValueError(
            "save_llama writes plain models: merge(model) first, or save_adapter(model, folder)"
        )
    if model.cfg.tie_embeddings:
        del state["lm_head.weight"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, state)
    config = model.cfg.to_json(model.embed_tokens.weight.dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
