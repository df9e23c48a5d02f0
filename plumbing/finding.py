"""Which checkpoint, tokenizer, adapter or run is meant, and whether they belong together: before any weight is read."""

import json
from dataclasses import fields
from pathlib import Path

import torch

from data import DataError, load_tokenizer
from llama import Llama, LlamaConfig, load_llama, open_llama
from plumbing import run_folder as runs
from plumbing.flags import CHECKPOINTS, FlagError, Settings, find_checkpoint, training_parser
from plumbing.peft_files import CheckpointError, read_adapter
from plumbing.hf_files import TensorFiles  # noqa: F401
from rora import load_adapter


def load_base(ckpt: str, device: torch.device, dtype: torch.dtype | None) -> Llama:
    folder = find_checkpoint(ckpt)
    model = load_llama(folder, device, dtype)
    model.source = ckpt if ckpt in CHECKPOINTS else str(folder)  # named in saved adapters
    return model


def find_tokenizer(ckpt: str):
    """The checkpoint's tokenizer, checked against its vocabulary."""
    folder = find_checkpoint(ckpt)
    cfg, tokenizer = LlamaConfig.from_json(folder / "config.json"), load_tokenizer(folder)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary only {cfg.vocab_size}: "
            "this is another model's tokenizer"
        )
    if cfg.vocab_size > 1.1 * tokenizer.vocab_size + 64:
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary {cfg.vocab_size}, more than "
            "padding explains: this is another model's tokenizer"
        )
    if tokenizer.vocab_size < cfg.vocab_size:
        print(
            f"note: the model's vocabulary of {cfg.vocab_size} is padded beyond the tokenizer's {tokenizer.vocab_size}"
        )
    if (cfg.bos, cfg.eos) != (tokenizer.bos, tokenizer.eos):
        print(
            f"note: config.json says bos/eos {cfg.bos}/{cfg.eos}; using the tokenizer's {tokenizer.bos}/{tokenizer.eos}"
        )
    return tokenizer


def find_adapter(folder: str | Path, ckpt: str | None) -> tuple[Path, str]:
    """(adapter folder, base checkpoint) for a run folder, a step folder, or any PEFT folder with --ckpt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise runs.RunError(f"no such folder: {folder}")
    if ckpt is None and (run := run_of(folder)):
        ckpt = read_run(run)["settings"]["ckpt"]
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: no adapter_config.json in it"
            + (
                ": nothing was validated yet; try its newest checkpoints/step-*"
                if (folder / "run.json").is_file()
                else ""
            )
        )
    if ((folder / runs.MANIFEST).is_file() or run_of(folder) not in (None, folder)) and (
        problem := runs.damage(folder)
    ):
        raise CheckpointError(f"{folder}: {problem}; use another checkpoint of that run")
    if ckpt is None:
        ckpt = read_adapter(folder)[0].base
        if ckpt is None or ckpt not in CHECKPOINTS and not Path(ckpt).is_dir():
            raise FlagError(f"{folder} does not say where its base is; add --ckpt")
    return folder, ckpt


def run_of(folder: Path) -> Path | None:
    """The run that an adapter folder belongs to."""
    return next(
        (run for run in (folder, folder.resolve().parent.parent) if (run / "run.json").is_file()),
        None,
    )


def read_run(run: Path) -> dict:
    """run.json, its settings checked as flags are. Raises RunError."""
    try:
        record = json.loads((run / "run.json").read_text())
        record["finished"], record["base_sha256"], record["data_sha256"]
        settings, parser = Settings(**record["settings"]), training_parser()
        for f in fields(Settings):
            value = getattr(settings, f.name)
            words = [
                f"--{f.name.replace('_', '-')}",
                *map(str, value if f.name == "targets" else [value]),
            ]
            if (
                not isinstance(None, f.type)
                if value is None
                else getattr(parser.parse_args(words), f.name) != value
            ):
                raise ValueError(f"{f.name} is {value!r}")
        return record
    except FileNotFoundError:
        raise runs.RunError(f"{run} is not a run folder: it has no run.json") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise runs.RunError(
            f"{run}/run.json is damaged or from another version ({e}); start the run again with --overwrite"
        ) from None


def refuse_strangers(folder: Path, ckpt: str) -> None:
    """Raise CheckpointError unless adapter, run and base belong together: before the base's weights are read."""
    trial, files, _ = open_llama(find_checkpoint(ckpt))
    settings = load_adapter(trial, folder)
    if run := run_of(folder):
        record = read_run(run)
        if files.fingerprint() != record["base_sha256"]:
            raise CheckpointError(
                f"{ckpt} is not the base that {folder} was trained on, {record['settings']['ckpt']}; to try it all the "
                "same, copy the two adapter files elsewhere"
            )
        for name, ours in [
            ("method", settings.method),
            ("scale", settings.scale),
            ("rank", settings.rank),
            ("alpha", settings.alpha),
        ]:
            if ours != record["settings"][name]:
                raise CheckpointError(
                    f"{folder}: the adapter's {name} is {ours}, but {run}/run.json says {record['settings'][name]}: "
                    "another run's adapter?"
                )
