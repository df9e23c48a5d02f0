"""What the functions of rora.py refuse, and in which words. It knows no method by name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from plumbing.hf_files import CheckpointError, finite, some
from plumbing.peft_files import MOST_ALPHA, adapter_file


class NonFiniteError(ValueError):
    """The loss, a gradient or a weight is NaN or infinite. Raised before a weight or file is."""


def bad_settings(methods: Mapping, scales: Mapping, method, rank, alpha, targets, scale) -> None:
    """The rules that attach() and the command line share. Raises ValueError."""
    if method not in methods:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(methods)}")
    row = methods[method]
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if scale is not None and scale not in scales:
        raise ValueError(f"unknown scale {scale!r}; choose from {', '.join(scales)}")
    if scale is not None and scale not in (row.layer.scale, *row.other_scales):
        named = [name for name, other in methods.items() if other.layer.scale == scale]
        advice = f"; method {named[0]} has it by name" if row.layer.scale and named else ""
        raise ValueError(f"method {method} does not take scale {scale}{advice}")
    if row.layer.scale and not (alpha and 0 < alpha < MOST_ALPHA):
        raise ValueError(f"alpha must be positive and below {MOST_ALPHA:g}, got {alpha}")
    if targets is not None and not list(targets):
        raise ValueError("no layer is named to adapt")
    if targets and not row.layer.any_target and set(targets) != set(row.layer.targets):
        raise ValueError(
            f"{method} sits on {some(row.layer.targets)} alone, not on {some(targets)}"
        )


def second_adapter(wrappers: Mapping) -> None:
    if wrappers:
        raise ValueError("the model has adapters already: merge(model) them, or load the base anew")


def no_adapter(wrappers: Mapping) -> None:
    if not wrappers:
        raise ValueError("the model has no adapter: attach(model, method, rank) first")


def missing_targets(method: str, targets: Iterable[str], known: set[str]) -> None:
    """Raise ValueError for a target that no layer is called."""
    if missing := set(targets) - known:
        raise ValueError(
            f"no layer to put {method} on is called {some(missing)}; "
            f"choose from {', '.join(sorted(known))}"
        )


def bias(method: str, base) -> None:
    if base.bias is not None:
        raise ValueError(f"{method} on a layer with a bias is not defined here; bias=False")


def unmergeable(methods: Mapping, method: str) -> None:
    if not hasattr(methods[method].layer, "merged_weight"):
        raise ValueError(f"{method} cannot be merged: what it adds is no change of a weight matrix")


def not_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, p in tensors.items():
        if not finite(p):
            raise NonFiniteError(f"{name} holds NaN or infinity; nothing was saved")


@contextmanager
def blaming(folder: str | Path) -> Iterator[None]:
    """A ValueError about what an adapter's config asks for becomes a CheckpointError."""
    try:
        yield
    except ValueError as e:
        raise CheckpointError(f"{folder}: {e}") from None


def misfits(folder: str | Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a file has the wanted names and shapes."""
    path = adapter_file(Path(folder))
    if missing := wanted.keys() - found.keys():
        raise CheckpointError(f"{path}: missing {some(missing)}")
    if extra := found.keys() - wanted.keys():
        raise CheckpointError(f"{path}: no place in this model for {some(extra)}")
    for name, p in wanted.items():
        if p.shape != found[name].shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(found[name].shape)}, this base needs {tuple(p.shape)}: "
                "another base?"
            )
