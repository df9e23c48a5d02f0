"""The three adapters that the paper compares RoRA with: Series, Parallel and Prefix.

Each is an Adapter, as the layers in rora.py are, and trains only what it adds; alpha plays no part
here. Definitions: AGI-Edgerunners/LLM-Adapters (Series, Parallel), PEFT's prefix tuning.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import Attention, Rows


class Adapter(Protocol):
    """What a method is to all other files: a module built as Adapter(base, rank, alpha, dropout)
    whose own parameters are what is saved."""

    base_type: type[nn.Module]  # what it can sit on
    targets: tuple[str, ...]  # where it sits by default, and
    any_target: bool  # whether --targets may put it elsewhere
    scale: str | None  # a row of SCALES; None: it has no scale, and alpha means nothing
    base: Any  # what it sits on, a base_type
    rank: int
    alpha: float | None
    dropout: nn.Dropout
    scaling: float  # where it has a scale
    named_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]
    merged_weight: Callable[[], Tensor]  # (O, I), where it can be merged


class SeriesAdapter(nn.Module):
    """Houlsby et al. 2019, a bottleneck behind a linear layer: z = W x, y = z + f(z).

    f(z) = up tanh(down z), and rank is its width. Both matrices start at N(0, 0.02²), so the start
    is near the base model, not equal to it.
    """

    base_type = nn.Linear
    targets = ("down_proj",)
    any_target = False  # whether it may sit on other layers than `targets`
    alpha = scale = None

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.base, self.rank, self.dropout = base, rank, nn.Dropout(dropout)
        width = self.width_in(base)
        device = base.weight.device
        self.adapter_down = nn.Parameter(torch.empty(rank, width, device=device).normal_(0, 0.02))
        self.adapter_up = nn.Parameter(
            torch.empty(base.out_features, rank, device=device).normal_(0, 0.02)
        )

    @staticmethod
    def width_in(base: nn.Linear) -> int:
        return base.out_features

    def bottleneck(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        h = torch.tanh(F.linear(self.dropout(x), self.adapter_down.to(x.dtype)))
        return F.linear(h, self.adapter_up.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        z = self.base(x)
        return z + self.bottleneck(z)


class ParallelAdapter(SeriesAdapter):
    """He et al. 2022, the bottleneck beside the linear layer:  y = W x + f(x)."""

    targets = ("up_proj", "down_proj")
    any_target = True

    @staticmethod
    def width_in(base: nn.Linear) -> int:
        return base.in_features

    def forward(self, x: Tensor) -> Tensor:  # (..., I) -> (..., O)
        return self.base(x) + self.bottleneck(x)


class PrefixAttention(nn.Module):
    """Li & Liang 2021: learned keys and values, seen by every token as if they came first.

    rank is their number P. To attention this is a KV cache that already holds P places. The learned
    keys are not rotated; real tokens stand at positions P, P + 1, ... (PEFT's convention). They
    start at N(0, 1), as PEFT's embedding does.
    """

    base_type = Attention
    targets = ("self_attn",)
    any_target = False
    alpha = scale = None

    def __init__(
        self, base: Attention, rank: int, alpha: float | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.base, self.rank, self.dropout = base, rank, nn.Dropout(0.0)
        shape = (base.n_kv_heads, rank, base.head_dim)  # (G, P, D)
        device = base.k_proj.weight.device
        self.prefix_k = nn.Parameter(torch.randn(shape, device=device))
        self.prefix_v = nn.Parameter(torch.randn(shape, device=device))

    @property
    def prefix_len(self) -> int:
        return self.rank

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        cache: tuple[Tensor, Tensor] | None = None,
        only: Tensor | None = None,
    ) -> Tensor:  # (N, C) -> (N, C)
        return self.base(x, rows, cache, only, past=(self.prefix_k, self.prefix_v))
