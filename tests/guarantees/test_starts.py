"""Before the first step: what does not fit is said in time, and a failed start leaves nothing."""

import json
import re
import resource
import shutil
from contextlib import nullcontext

import pytest
import torch
from helpers import flags, jobs, make_world, refused, run, score, tree

from plumbing import memory, processes

SHORT = {"max_steps": 2, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# --- how much memory there is ---------------------------------------------------------------------

GB = 1_000_000_000


def machine(root, cgroup: str, files: dict[str, object]) -> int:
    """What is available on a machine of 64 GB whose /proc and /sys say this."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemAvailable:   {64 * GB // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/statm").write_text("1000 0 0 0 0 0 0\n")
    for name, value in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return memory.available(torch.device("cpu"), root)


def group(name: str, most: object, used: int, cache: int = 0) -> dict[str, object]:
    return {
        f"{name}memory.max": most,
        f"{name}memory.current": used,
        f"{name}memory.stat": f"anon 1\ninactive_file {cache}",
    }


def test_without_a_limit_it_is_what_the_system_has(tmp_path):
    assert machine(tmp_path, "0::/\n", {}) == 64 * GB // 1024 * 1024
    assert machine(tmp_path / "max", "0::/a\n", group("a/", "max", GB)) > 63 * GB


def test_a_container_s_limit_counts_less_what_it_uses_without_its_file_cache(tmp_path):
    assert machine(tmp_path, "0::/a\n", group("a/", 16 * GB, 10 * GB, cache=4 * GB)) == 10 * GB


def test_of_nested_groups_the_tightest_counts(tmp_path):
    files = group("a/", 8 * GB, 6 * GB) | group("a/b/", 16 * GB, GB)
    assert machine(tmp_path, "0::/a/b\n", files) == 2 * GB


def test_a_container_that_sees_its_own_group_as_the_root_is_limited_too(tmp_path):
    assert machine(tmp_path, "0::/docker/123\n", group("", 4 * GB, GB)) == 3 * GB


def test_version_1_of_control_groups_is_read_too(tmp_path):
    files = {
        "memory/x/memory.limit_in_bytes": 16 * GB,
        "memory/x/memory.usage_in_bytes": 9 * GB,
        "memory/x/memory.stat": f"total_inactive_file {2 * GB}",
    }
    assert machine(tmp_path, "12:cpu,cpuacct:/x\n5:memory:/x\n", files) == 9 * GB


def test_ulimit_v_counts_less_what_is_mapped_already(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 * GB, resource.RLIM_INFINITY))
    page = resource.getpagesize()
    assert machine(tmp_path, "0::/\n", {}) == 3 * GB - 1000 * page


# --- --check --------------------------------------------------------------------------------------


def test_a_plan_that_does_not_fit_stops_the_check_before_the_weights_are_read(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "available", lambda device: 1_000_000)
    monkeypatch.setattr(jobs, "load_base", lambda *a: pytest.fail("the weights were read"))
    result = run(*flags(world, None, **SHORT), "--check")
    refused(result, 1, "of 0.0 GB", "--micro-batch-size", "--rank")
    assert "memory: about" in result.out


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("method", ["rora", "dora"])
def test_config_json_is_enough_to_plan_with(world, tmp_path, method, tokenizer):
    base = tmp_path / "base"
    base.mkdir()
    for name in ["config.json"] + ["tokenizer.model"] * tokenizer:
        shutil.copyfile(world.base / name, base / name)
    before = tree(tmp_path)
    wanted = flags(world, None, ckpt=base, method=method, **SHORT)
    result = run(*wanted, "--check")
    assert result.code == 0 and "nothing was measured" in result.out
    assert ("has no tokenizer" in result.out) != tokenizer
    assert tree(tmp_path) == before
    if tokenizer:  # it is the plan that is made beside the weights
        with_weights = run(*flags(world, None, method=method, **SHORT), "--check").out
        plan = [line.split(") of ")[0] for line in with_weights.splitlines() if "memory: " in line]
        assert plan[0] in result.out


# --- a start that fails ---------------------------------------------------------------------------


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("where", ["plan_memory", "follow"])
def test_after_a_start_that_failed_the_same_command_works(world, tmp_path, monkeypatch, where):
    with monkeypatch.context() as m:
        m.setattr(jobs, where, fail_with(MemoryError("no more")))
        assert run(*flags(world, tmp_path / "run", **SHORT)).code == 1
    assert list(tmp_path.iterdir()) == []
    assert run(*flags(world, tmp_path / "run", **SHORT)).code == 0


def test_a_compiler_that_fails_is_one_line_and_leaves_nothing(world, tmp_path, monkeypatch):
    import torch._dynamo.exc

    error = torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler\n" + "trace\n" * 110)
    monkeypatch.setattr(jobs, "follow", fail_with(error))
    monkeypatch.setattr(jobs, "refuse_uncompilable", lambda device: None)
    result = run(*flags(world, tmp_path / "run", **SHORT), "--compile")
    refused(result, 1, "--compile failed", "no C++ compiler", "leave it out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"batch_size": 3}, {"batch_size": 64, "val_size": 23}])
@pytest.mark.parametrize("job", [[], ["--check"]])
def test_more_processes_than_a_batch_has_records_are_refused(
    world, tmp_path, monkeypatch, changed, job
):
    monkeypatch.setattr(processes, "joined", nullcontext)
    monkeypatch.setattr(processes, "world", lambda: 4)
    out = None if job else tmp_path / "run"
    result = run(*flags(world, out, **SHORT | changed), *job)
    refused(result, 2, "4 processes", "--batch-size")
    assert list(tmp_path.iterdir()) == []


def test_positions_that_the_model_was_not_made_for_are_told(world, tmp_path):
    base = shutil.copytree(world.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    result = run(*flags(world, tmp_path / "run", ckpt=base, **SHORT))
    assert result.code == 0 and "made for 40 positions" in result.out
    result = score(tmp_path / "run", "--data", world.tests, "--tasks", "piqa", "--limit", 1)
    assert result.code == 0 and "beyond the 40 positions" in result.out


def test_a_check_counts_an_epoch_s_tokens_once_however_few_fill_a_batch(
    world, tmp_path, monkeypatch
):
    command = flags(world, tmp_path / "run", epochs=30, batch_size=1000)
    said = run(*command, "--check").out.replace(",", "")
    tokens = int(re.search(r"(\d+) tokens an epoch", said)[1])
    monkeypatch.setattr(jobs, "measure", lambda *a: tokens / 60)  # an epoch a minute
    assert "about 30.0 minutes" in run(*command, "--check").out


def test_holding_out_more_than_is_trained_on_is_told(world, tmp_path):
    for held_out, told in ((13, False), (14, True)):
        result = run(*flags(world, tmp_path / "run", **SHORT, val_size=held_out), "--check")
        assert result.code == 0 and ("more records are held out" in result.out) == told


def test_a_check_takes_the_command_that_it_stands_before(world, tmp_path):
    command = flags(world, tmp_path / "run", **SHORT, targets="q_proj,v_proj")
    assert run(*command, "--check").code == 0 and not (tmp_path / "run").exists()
    assert run(*command).code == 0
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["settings"]["targets"] == ["q_proj", "v_proj"]
    refused(run(*command, "--check"), 2, "exists", "--overwrite")
