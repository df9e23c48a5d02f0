"""Which checkpoint, tokenizer, adapter or run is meant, and whether they belong together: before
any weight is read."""

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from data import DataError, load_tokenizer
from llama import Llama, LlamaConfig, load_llama, open_llama
from plumbing import run_folder
from plumbing.checkpoints import CHECKPOINTS, name_of
from plumbing.flags import FlagError, Settings, find_checkpoint
from plumbing.hf_files import CheckpointError, TensorFiles, finite, read_json
from plumbing.peft_files import ConfigFile, adapter_file
from plumbing.tokenizer_files import find_tokenizer_file
from rora import NonFiniteError, load_adapter


def load_base(ckpt: str, device: torch.device, dtype: torch.dtype | None) -> Llama:
    folder = find_checkpoint(ckpt)
    model = load_llama(folder, device, dtype)
    refuse_not_finite(model, f"{folder}: ", "; the file is damaged: download it again")
    model.source = str(folder.resolve())  # named in saved adapters
    if ckpt in CHECKPOINTS:
        model.source = CHECKPOINTS[ckpt].hub or model.source
    elif "/" in ckpt and folder == Path("checkpoints") / ckpt:  # fetched by the hub's name
        model.source = ckpt
    return model


def refuse_not_finite(model: Llama, before: str, after: str) -> None:
    """Raise NonFiniteError with the name of a weight that holds NaN or infinity."""
    weights = dict(model.named_parameters())
    goods = torch.stack([finite(p) for p in weights.values()])
    for name, good in zip(weights, goods.tolist()):  # the device is waited for once
        if not good:
            raise NonFiniteError(f"{before}{name} holds NaN or infinity{after}")


# What a config says that changes nothing the model computes, or that the weights themselves tell.
BESIDE_THE_MEANING = ("bos", "eos", "max_positions", "tie_embeddings")


def base_identity(ckpt: str) -> str:
    """By what a base is known again: its weights and its config's meaning, not how and where they
    are written."""
    folder = find_checkpoint(ckpt)
    meaning = asdict(LlamaConfig.from_json(folder / "config.json"))
    said = {k: v for k, v in meaning.items() if v is not None and k not in BESIDE_THE_MEANING}
    text = json.dumps(said, sort_keys=True) + TensorFiles(folder).identity()
    return KNOWN_BY + hashlib.sha256(text.encode()).hexdigest()


SCALE_KINDS = (int, float, type(None))
KNOWN_BY = "sampled weights: "  # earlier versions knew a base by its files' headers


def tokenizer_identity(ckpt: str) -> str:
    return run_folder.sha256(find_tokenizer_file(find_checkpoint(ckpt)))


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
            steps = run_folder.checkpoints(folder)
            hint = f"; try {steps[0]}" if steps else ", and no checkpoint to score"
            hint = f": nothing was validated yet{hint}"
        elif (folder / "config.json").is_file():
            hint = ": a base model is named with --ckpt"
        raise CheckpointError(f"{folder}: no adapter_config.json in it{hint}")
    if (folder / run_folder.MANIFEST).is_file() or run not in (None, folder):
        if problem := run_folder.damage(folder):
            raise CheckpointError(f"{folder}: {problem}; use another checkpoint of that run")
    if ckpt is None:
        ckpt = ConfigFile(folder / "adapter_config.json").text("base_model_name_or_path")
        ckpt = ckpt and (name_of(ckpt) or ckpt)
        here = ckpt and (Path(ckpt).is_dir() or (Path("checkpoints") / ckpt).is_dir())
        if ckpt is None or ckpt not in CHECKPOINTS and not here:
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
        for key in ("finished", "base_sha256", "data_sha256", "tokenizer_sha256"):
            run_json[key]
        if not run_json["base_sha256"].startswith(KNOWN_BY):
            raise ValueError("base_sha256 is not of sampled weights")
        kinds = {"processes": int, "steps": int, "effective_scale": SCALE_KINDS}
        kinds |= dict.fromkeys(("finished", "compile", "graphs"), bool)
        for key, kind in kinds.items():
            if key in run_json and not isinstance(run_json[key], kind):
                raise ValueError(f"{key} is {run_json[key]!r}")
        float(run_json.get("effective_scale") or 0)  # a number that is one
        Settings.from_json(run_json["settings"])
        return run_json
    except FileNotFoundError:
        run = run_of(folder)
        hint = f"; {run} is one" if run else ""
        raise run_folder.RunError(
            f"{folder} is not a run folder: it has no run.json{hint}"
        ) from None
    except OSError as e:
        raise run_folder.RunError(f"{folder}/run.json: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise run_folder.RunError(
            f"{folder}/run.json is damaged or from another version ({e}); start the run again with "
            "--overwrite"
        ) from None


RESULTS = "results.json"


def read_scores(folder: Path) -> dict | None:
    """The results.json of a run folder, or of eval.py's --out, checked; None where there is none.
    "tasks" is empty where what was scored is another adapter than the one that is there."""
    path = next((p for p in (folder / "eval" / RESULTS, folder / RESULTS) if p.is_file()), None)
    if path is None:
        return None
    results = read_json(path)
    try:
        scored = results["adapter_sha256"]
        for row in results["tasks"].values():
            percents = [row["accuracy"], row["constant"], 100 * row["correct"] / row["n"]]
            if not all(0 <= x <= 100 for x in percents):
                raise ValueError(percents)
        still = is_still(folder, scored)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise CheckpointError(
            f"{path}: not as eval.py wrote it; python eval.py {folder} makes it again"
        ) from None
    return results if still else results | {"tasks": {}}


def is_still(folder: Path, scored: str | None) -> bool:
    """Whether the adapter that was scored is the one that is there."""
    if scored is None or not (folder / "adapter_config.json").is_file():
        return True
    same = run_folder.sha256(adapter_file(folder)) == scored
    if not same:
        print(
            f"note: {folder} was trained on since it was scored; move its eval/ away and score it "
            "again",
            file=sys.stderr,
        )
    return same


def refuse_strangers(folder: Path, ckpt: str) -> None:
    """Raise CheckpointError unless adapter, run and base belong together: before the base's weights
    are read."""
    trial = open_llama(find_checkpoint(ckpt))[0]
    adapter = load_adapter(trial, folder)
    run = run_of(folder)
    if not run:
        return
    run_json = read_run(run)
    settings = run_json["settings"]
    if base_identity(ckpt) != run_json["base_sha256"]:
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
