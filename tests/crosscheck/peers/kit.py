"""What each script in this folder shares: the conformance kit, and how a result is told.

A script runs in its peer's own environment and prints one JSON object per result, on a line of its
own; run.py gathers them. It imports the peer, this file, and of this project what it compares with.
"""

import json
import os
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from data import format_prompt  # noqa: E402
from tools.conform import AGREES, differences  # noqa: E402

KIT = ROOT / "tests/golden/kit"
RANK, ALPHA = 4, 16
SCALE = {"lora": ALPHA / RANK, "rora": ALPHA / RANK**0.5}
SCALE |= {"dora": SCALE["lora"], "dora-sqrt": SCALE["rora"]}
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

torch.set_num_threads(1)


def trace(case: str) -> dict[str, Tensor]:
    return load_file(KIT / case / "trace.safetensors")


def weights() -> dict[str, Tensor]:
    return load_file(KIT / "model/model.safetensors")


def adapter(case: str) -> dict[str, Tensor]:
    """layers.0.self_attn.q_proj.lora_A -> its value, also of lora_B and lora_magnitude_vector."""
    tensors = load_file(KIT / case / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".weight"): t
        for name, t in tensors.items()
    }


def real_data() -> Path | None:
    """The folder with the real records and tokenizers, where there is one."""
    folder = Path(os.environ.get("RORA_DATA") or ROOT.parent / "shared" / "data")
    return folder if (folder / "tokenizer.model").is_file() else None


def prompts(data: Path) -> list[str]:
    """The first 200 test questions of each task, as the model sees them."""
    tasks = [json.loads(path.read_bytes()) for path in sorted((data / "eval").glob("*.json"))]
    return [format_prompt(record) for task in tasks for record in task[:200]]


# --- telling --------------------------------------------------------------------------------------


def tell(kind: str, what: str, figure: float, within: float, shown: str | None = None, **more):
    row = {"kind": kind, "what": what, "figure": float(figure), "within": within}
    print(json.dumps(row | {"shown": shown or f"{figure:.1e}", **more}), flush=True)


def agrees(what: str, figure: float, within: float = AGREES, shown: str | None = None) -> None:
    """A difference that must stay below `within`."""
    tell("agrees", what, figure, within, shown)


def conforms(case: str, theirs: dict[str, Tensor]) -> None:
    """The peer's tensors, named as in the kit's trace, against ours: the largest difference."""
    told = differences(trace(case), {name: t.detach().float() for name, t in theirs.items()})
    kinds = [k for k in ("logits", "loss", "grad") if any(n.startswith(k) for n in told)]
    names = {"grad": "gradients"}
    agrees(f"{case}: {', '.join(names.get(k, k) for k in kinds)}", max(told.values()))


def deviates(
    what: str, figure: float, within: float = AGREES, *, seen: str, shown: str | None = None
) -> None:
    """A difference known from version `seen`; below `within` it is gone."""
    tell("deviates", what, figure, within, shown, seen=seen)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, over the largest value of ours."""
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def off(ours: Tensor, theirs: Tensor) -> float:
    """The difference as a whole, over ours as a whole: what "15% off" means."""
    return ((ours - theirs).norm() / ours.norm()).item()


def skip(what: str, why: str) -> None:
    tell("skipped", what, 0.0, 0.0, shown=why)
