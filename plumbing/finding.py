"""Which checkpoint, tokenizer, adapter or run is meant, and whether they belong together: before
any weight is read."""

import json
from pathlib import Path

import torch

from data import DataError, load_tokenizer
from llama import Llama, LlamaConfig, load_llama, open_llama
from plumbing import run_folder
from plumbing.flags import CHECKPOINTS, FlagError, Settings, find_checkpoint
from plumbing.peft_files import CheckpointError, ConfigFile
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
    has, wanted = tokenizer.vocab_size, cfg.vocab_size
    if has > wanted:
        raise DataError(
            f"{folder}: the tokenizer has {has} ids, the model's vocabulary only {wanted}: this is "
            "another model's tokenizer"
        )
    if wanted > 1.1 * has + 64:
        raise DataError(
            f"{folder}: the tokenizer has {has} ids, the model's vocabulary {wanted}, more than "
            "padding explains: this is another model's tokenizer"
        )
    if has < wanted:
        print(f"note: the model's vocabulary of {wanted} is padded beyond the tokenizer's {has}")
    if (cfg.bos, cfg.eos) != (tokenizer.bos, tokenizer.eos):
        print(
            f"note: config.json says bos/eos {cfg.bos}/{cfg.eos}; using the tokenizer's "
            f"{tokenizer.bos}/{tokenizer.eos}"
        )
    return tokenizer


def find_adapter(folder: str | Path, ckpt: str | None) -> tuple[Path, str]:
    """(adapter folder, base checkpoint) for a run folder, a step folder, or any PEFT folder with
    --ckpt."""
    folder = Path(folder)
    if not folder.is_dir():
        raise run_folder.RunError(f"no such folder: {folder}")
    run = run_of(folder)
    if ckpt is None and run:
        ckpt = read_run(run)["settings"]["ckpt"]
    if not (folder / "adapter_config.json").is_file():
        hint = ""
        if (folder / "run.json").is_file():
            hint = ": nothing was validated yet; try its newest checkpoints/step-*"
        raise CheckpointError(f"{folder}: no adapter_config.json in it{hint}")
    if (folder / run_folder.MANIFEST).is_file() or run not in (None, folder):
        if problem := run_folder.damage(folder):
            raise CheckpointError(f"{folder}: {problem}; use another checkpoint of that run")
    if ckpt is None:
        ckpt = ConfigFile(folder / "adapter_config.json").text("base_model_name_or_path")
        if ckpt is None or ckpt not in CHECKPOINTS and not Path(ckpt).is_dir():
            raise FlagError(f"{folder} does not say where its base is; add --ckpt")
    return folder, ckpt


def run_of(folder: Path) -> Path | None:
    """The run that an adapter folder belongs to."""
    for run in (folder, folder.resolve().parent.parent):
        if (run / "run.json").is_file():
            return run
    return None


def read_run(folder: Path) -> dict:
    """run.json, its settings checked. Raises RunError."""
    try:
        run_json = json.loads((folder / "run.json").read_text())
        for key in ("finished", "base_sha256", "data_sha256"):
            run_json[key]
        Settings.from_json(run_json["settings"])
        return run_json
    except FileNotFoundError:
        raise run_folder.RunError(f"{folder} is not a run folder: it has no run.json") from None
    except OSError as e:
        raise run_folder.RunError(f"{folder}/run.json: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise run_folder.RunError(
            f"{folder}/run.json is damaged or from another version ({e}); start the run again with "
            "--overwrite"
        ) from None


def refuse_strangers(folder: Path, ckpt: str) -> None:
    """Raise CheckpointError unless adapter, run and base belong together: before the base's weights
    are read."""
    trial, files, _ = open_llama(find_checkpoint(ckpt))
    adapter = load_adapter(trial, folder)
    run = run_of(folder)
    if not run:
        return
    run_json = read_run(run)
    settings = run_json["settings"]
    if files.fingerprint() != run_json["base_sha256"]:
        raise CheckpointError(
            f"{ckpt} is not the base that {folder} was trained on, {settings['ckpt']}; to try it "
            "all the same, copy the two adapter files elsewhere"
        )
    for name in ("method", "scale", "rank", "alpha"):
        if getattr(adapter, name) != settings[name]:
            raise CheckpointError(
                f"{folder}: the adapter's {name} is {getattr(adapter, name)}, but {run}/run.json "
                f"says {settings[name]}: another run's adapter?"
            )
