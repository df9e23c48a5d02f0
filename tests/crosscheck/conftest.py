"""Small checkpoints written by transformers, and the table of the largest deviations from peers.

    pip install -r tests/crosscheck/requirements.txt
    pytest -m crosscheck tests/crosscheck

Without `-m crosscheck` this folder is left alone: it imports packages that the project does not run
on. RORA_DATA names the folder with the records and tokenizers (default: shared/data beside the
checkout).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
DEVIATIONS = pytest.StashKey[dict]()


def pytest_ignore_collect(collection_path, config):
    if collection_path.suffix == ".py" and config.option.markexpr != "crosscheck":
        return True


@pytest.fixture(scope="session", autouse=True)
def quiet():
    import transformers

    torch.set_num_threads(1)  # tensors this small only make threads wait for each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# --- real records ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = Path(os.environ.get("RORA_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "tokenizer.model").is_file():
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"no tokenizer.model, eval/ and train/ in {folder}: set RORA_DATA")
    return folder


@pytest.fixture(scope="session")
def records(data_folder) -> dict[str, list[dict]]:
    """Every record there is: {"eval/piqa": [...], "train/boolq": [...], ...}"""
    return {
        f"{path.parent.name}/{path.stem}": json.loads(path.read_bytes())
        for path in sorted(data_folder.glob("*/*.json"))
    }


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face folder; make fetches it."""
    made = ROOT / ".venv-crosscheck" / "smollm2-135m"
    folder = Path(os.environ.get("RORA_SMOLLM2", made))
    if not (folder / "model.safetensors").is_file():
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"no SmolLM2 in {folder}: make .venv-crosscheck/smollm2-135m, or set RORA_SMOLLM2")
    return folder


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def make_llama(tmp_path):
    """make_llama(files="model.safetensors", **config) -> (folder, transformers' model in fp32).

    `files` is a file name, or (name, size) for shards of that many bytes. `scaling`: what
    config.json says of rotary scaling. The weights are wide enough for logits of order 1, and the
    norms' weights are not all one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(files="model.safetensors", seed=0, rope_theta=10000.0, scaling=None, **config):
        torch.manual_seed(seed)
        small = dict(
            hidden_size=64,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=320,
            initializer_range=0.12,
            rms_norm_eps=1e-6,
        )
        rope = {"rope_type": "default", "rope_theta": rope_theta} | (scaling or {})
        model = LlamaForCausalLM(LlamaConfig(**small | config, rope_parameters=rope)).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        folder = tmp_path / f"llama-{len(list(tmp_path.iterdir()))}"
        name, shard_bytes = files if isinstance(files, tuple) else (files, 10**9)
        model.save_pretrained(folder, max_shard_size=shard_bytes)
        if name.endswith(
            ".bin"
        ):  # transformers 5 no longer writes these; most LLaMA folders hold them
            for path in folder.glob("*.safetensors*"):
                path.unlink()
            write_bins(model.state_dict(), folder, sharded=isinstance(files, tuple))
        return folder, model

    return make


@pytest.fixture
def make_base(make_llama, data_folder):
    """make_base(**config) -> (folder, model): make_llama with the real LLaMA tokenizer."""

    def make(**config):
        folder, model = make_llama(vocab_size=32000, num_key_value_heads=2, **config)
        shutil.copyfile(data_folder / "tokenizer.model", folder / "tokenizer.model")
        return folder, model

    return make


def write_bins(state: dict, folder: Path, sharded: bool) -> None:
    """pytorch_model.bin, or two shards and their index, with the rotary tables of old ones."""
    state = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names, where = list(state), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )


@pytest.fixture(scope="session")
def padded():
    """padded(records) -> transformers' inputs: padded right, a mask, -100 if not learned."""

    def pad(records) -> dict[str, torch.Tensor]:
        T = max(len(r.ids) for r in records)
        rows = [(list(r.ids), r.split, T - len(r.ids)) for r in records]
        return {
            "input_ids": torch.tensor([ids + [0] * n for ids, _, n in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * n for ids, _, n in rows]),
            "labels": torch.tensor(
                [[-100] * split + ids[split:] + [-100] * n for ids, split, n in rows]
            ),
        }

    return pad


# --- the table of deviations ----------------------------------------------------------------------


def pytest_configure(config):
    config.stash[DEVIATIONS] = {}
    config.addinivalue_line(
        "filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning"
    )  # PEFT asks transformers


@pytest.fixture
def deviation(request):
    """deviation(quantity, whom, ours, theirs) -> (largest difference, the same over their largest).

    Each call enters the table; of several with one quantity and peer, the largest stays.
    """
    table = request.config.stash[DEVIATIONS]

    def compare(
        quantity: str, whom: str, ours: torch.Tensor, theirs: torch.Tensor
    ) -> tuple[float, float]:
        assert ours.shape == theirs.shape
        ours, theirs = ours.detach().double(), theirs.detach().double()
        absolute = (ours - theirs).abs().max().item()
        relative = absolute / max(theirs.abs().max().item(), 1e-30)
        seen = table.get((quantity, whom), (0.0, 0.0))
        table[quantity, whom] = (max(seen[0], absolute), max(seen[1], relative))
        return absolute, relative

    return compare


@pytest.fixture
def mismatches(request):
    """mismatches(quantity, whom, pairs) -> how many pairs differ, entered into the table."""
    table = request.config.stash[DEVIATIONS]

    def compare(quantity: str, whom: str, pairs) -> int:
        differ = [ours != theirs for ours, theirs in pairs]
        table[quantity, whom] = (sum(differ), f"of {len(differ):,}")
        return sum(differ)

    return compare


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Print the table; a whole and successful run also writes it to deviations.md."""
    rows = config.stash[DEVIATIONS]
    lines = ["| quantity | ours against | largest difference | relative |", "|---|---|---|---|"]
    for (quantity, whom), cells in rows.items():
        cells = [f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join([quantity, whom, *cells]) + " |")
    if rows:
        terminalreporter.write_line("\n" + "\n".join(lines))
    passed = {Path(report.fspath).name for report in terminalreporter.stats.get("passed", [])}
    left_out = [
        item for item in terminalreporter.stats.get("deselected", []) if HERE in item.path.parents
    ]
    if (
        exitstatus == 0
        and not left_out
        and passed >= {path.name for path in HERE.glob("test_*.py")}
    ):
        (HERE / "deviations.md").write_text("\n".join(lines) + "\n")
