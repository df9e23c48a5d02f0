"""Hold another implementation of LoRA, RoRA, DoRA or prefix tuning against this one.

    python tools/conform.py tests/golden/kit/rora --logits FILE

Prints how far each of FILE's tensors is from the kit's, and, where the logits differ, which known
mistake would explain them. Exit code 0: they agree; 4: they do not; 3: a file cannot be used.
What to compute, and what other frameworks got: tools/CONFORM.md.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from llama import Llama, load_llama  # noqa: E402
from plumbing.hf_files import CheckpointError  # noqa: E402
from rora import DoRALinear, LoRALinear, load_adapter, wrappers  # noqa: E402
from tools.meta_to_hf import hf_to_meta, meta_to_hf  # noqa: E402

# Of the largest value: fp32's rounding stays a hundred times below, a mistake far above.
AGREES = 1e-4


def read_theirs(path: Path, want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Safetensors with tensors named as in trace.safetensors; or bare little-endian fp32 logits."""
    shape = want["logits"].shape
    try:
        if path.suffix == ".safetensors":
            theirs = load_file(path)
        else:
            numbers = bytearray(path.read_bytes())
            if len(numbers) != 4 * shape.numel():
                raise ValueError(
                    f"{len(numbers)} bytes, and no .safetensors; bare fp32 logits of shape "
                    f"{tuple(shape)} have {4 * shape.numel()}"
                )
            theirs = {"logits": torch.frombuffer(numbers, dtype=torch.float32).view(shape)}
    except (OSError, SafetensorError, ValueError) as e:
        raise CheckpointError(f"{path}: {e}") from None
    if "logits" not in theirs:
        raise CheckpointError(f"{path}: no tensor is called logits")
    for name, tensor in theirs.items():
        if name in want and tensor.shape != want[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(tensor.shape)}, expected {tuple(want[name].shape)}"
            )
    return theirs


def differences(want: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of each tensor that both have: the largest difference, over the largest value of ours."""
    told = {}
    for name in want.keys() & theirs.keys() - {"ids", "targets"}:
        ours, other = want[name].double(), theirs[name].double()
        told[name] = ((ours - other).abs().max() / ours.abs().max()).item()
    return dict(sorted(told.items()))


# --- mistakes -------------------------------------------------------------------------------------


def scaled(s: Callable[[float, int], float]):
    def change(model: Llama) -> None:
        for layer in wrappers(model).values():
            layer.alpha *= s(layer.alpha, layer.rank) / layer.scaling

    return change


def base_alone(model: Llama) -> None:
    for layer in wrappers(model).values():
        layer.lora_B.zero_()
        if isinstance(layer, DoRALinear):
            layer.magnitude.copy_(layer.norm())


def left_out(target: str):
    """No update on one of the adapted layers."""

    def change(model: Llama) -> None:
        for name, layer in wrappers(model).items():
            if name.endswith(target):
                layer.lora_B.zero_()

    return change


def magnitudes_unread(model: Llama) -> None:
    for layer in wrappers(model).values():
        layer.magnitude.copy_(layer.base.weight.norm(dim=1))


def no_magnitudes(model: Llama) -> None:
    for layer in wrappers(model).values():
        layer.magnitude.copy_(layer.norm())


def norm_without_s(model: Llama) -> None:
    for layer in wrappers(model).values():
        wrong = (layer.base.weight + layer.lora_B @ layer.lora_A).norm(dim=1)
        layer.magnitude.mul_(layer.norm() / wrong)


def permuted(order: Callable[[Tensor, int], Tensor], what: tuple[str, ...]):
    """Rows of q and k in the other layout's order, in the adapter's tensors of these names."""

    def change(model: Llama) -> None:
        for name, layer in wrappers(model).items():
            heads = {"q_proj": model.cfg.n_heads, "k_proj": model.cfg.n_kv_heads}
            if n := heads.get(name.rpartition(".")[2]):
                for parameter in what:
                    if hasattr(layer, parameter):
                        p = getattr(layer, parameter)
                        p.copy_(order(p, n))

    return change


def swapped(model: Llama) -> None:
    for layer in wrappers(model).values():
        layer.prefix_k, layer.prefix_v = layer.prefix_v, layer.prefix_k


def rotated(positions: Callable[[int], Tensor]):
    def change(model: Llama) -> None:
        for layer in wrappers(model).values():
            k = layer.prefix_k.transpose(0, 1)  # (P, G, D)
            frequencies = model.cfg.rope_theta ** -(torch.arange(0, k.size(2), 2) / k.size(2))
            angles = torch.outer(positions(k.size(0)), frequencies)[:, None]  # (P, 1, D/2)
            k1, k2 = k.chunk(2, dim=2)
            cos, sin = angles.cos(), angles.sin()
            turned = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], dim=2)
            layer.prefix_k.copy_(turned.transpose(0, 1))

    return change


ALL_SEVEN = (*LoRALinear.targets, "o_proj", "gate_proj")  # the kit adapts every linear layer
LORA = {
    "the base model alone: the adapter plays no part": base_alone,
    "the scale α/r": scaled(lambda alpha, r: alpha / r),
    "the scale α/√r": scaled(lambda alpha, r: alpha / r**0.5),
    "the scale α": scaled(lambda alpha, r: alpha),
    "the scale 1": scaled(lambda alpha, r: 1.0),
    "lora_B of q and k in Meta's row order": permuted(hf_to_meta, ("lora_B", "magnitude")),
    "lora_B of q and k permuted for Meta's row order, on weights that are not": permuted(
        meta_to_hf, ("lora_B", "magnitude")
    ),
    **{f"no adapter on {target}": left_out(target) for target in ALL_SEVEN},
}
DORA = {
    "magnitudes left at ‖W‖: those of the file were not read": magnitudes_unread,
    "no magnitudes: LoRA without DoRA": no_magnitudes,
    "a norm of W + B A, without the scale s": norm_without_s,
    "magnitudes of q and k in Meta's row order, lora_B in Hugging Face's": permuted(
        hf_to_meta, ("magnitude",)
    ),
    "magnitudes of q and k not in the row order that lora_B was brought to": permuted(
        meta_to_hf, ("magnitude",)
    ),
}
PREFIX = {
    "keys and values of the prefix exchanged": swapped,
    "the learned keys rotated as tokens 0 … P−1": rotated(torch.arange),
    "tokens counted from position 0, not from P": rotated(lambda P: torch.tensor([P]).expand(P)),
}


def suspects(method: str) -> dict[str, Callable[[Llama], None]]:
    return PREFIX if method == "prefix" else LORA | (DORA if method == "dora" else {})


@torch.no_grad()
def wrong_logits(folder: Path, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(a mistake, the logits that it leads to), one after the other."""
    base = load_llama(folder.parent / "model", dtype=torch.float32).eval()
    yield "the base model alone: the adapter plays no part", base(ids)
    if (folder / "adapter_config.json").exists():
        method = load_adapter(base, folder).method
        for what, change in suspects(method).items():
            model = copy.deepcopy(base)
            change(model)
            yield what, model(ids)


def explain(folder: Path, want: dict[str, Tensor], logits: Tensor) -> str | None:
    """The mistake whose logits these are."""
    right = want["logits"]
    for what, wrong in wrong_logits(folder, want["ids"]):
        mistake = (wrong - right).abs().max()
        if mistake > 0 and (wrong - logits).abs().max() < AGREES * right.abs().max():
            return what
    return None


def conform(folder: Path, path: Path) -> int:
    want = load_file(folder / "trace.safetensors")
    theirs = read_theirs(path, want)
    told = differences(want, theirs)
    for name, relative in told.items():
        print(f"{name:45} {relative:.1e} of the largest value{'' if relative < AGREES else '  <-'}")
    if all(relative < AGREES for relative in told.values()):
        print(f"agrees: all {len(told)} tensors, to {max(told.values()):.1e}")
        return 0
    if told["logits"] < AGREES:
        print("the logits agree, other tensors do not")
        return 4
    blocks = [name for name in told if name.startswith("layers.") and not told[name] < AGREES]
    if blocks:
        print(f"the first block that differs: {blocks[0]}")
    kind = str(theirs["logits"].dtype).removeprefix("torch.")
    if not theirs["logits"].isfinite().all():
        print("the logits hold NaN or infinity")
    elif what := explain(folder, want, theirs["logits"]):
        print(f"the logits are those of a known mistake: {what}")
    elif kind in ("bfloat16", "float16"):
        print(f"the logits are {kind}, which rounds by 1e-2 and more: compare in fp32")
    elif folder.name != "base":
        print(f"no known mistake gives these logits; does {folder.parent / 'base'} agree?")
    return 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder of tests/golden/kit")
    parser.add_argument("--logits", type=Path, required=True, help="safetensors, or raw fp32")
    args = parser.parse_args(argv)
    try:
        if not (args.folder / "trace.safetensors").is_file():
            raise CheckpointError(f"{args.folder}: no trace.safetensors in it")
        return conform(args.folder, args.logits)
    except CheckpointError as e:
        print(f"conform: {e}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
