"""How Llama 3.1 reads positions that it was not first trained at, and how config.json says so."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import SMALL

from llama import LlamaConfig, RopeScaling, rope_frequencies
from plumbing.hf_files import CheckpointError

LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"type": "linear", "factor": 4.0}
WIDE = dataclasses.replace(SMALL, dim=512, rope_theta=5e5)  # heads of Llama 3.1's width, 128


def read(tmp_path, **keys):
    plain = SMALL.to_json(torch.float32) | {"rope_theta": None}
    (tmp_path / "config.json").write_text(json.dumps(plain | keys))
    return LlamaConfig.from_json(tmp_path / "config.json")


def scaled(scaling):
    return rope_frequencies(dataclasses.replace(WIDE, rope_scaling=scaling))


# --- what it computes -----------------------------------------------------------------------------


def test_linear_scaling_divides_every_frequency():
    assert torch.equal(scaled(RopeScaling(4.0)), rope_frequencies(WIDE) / 4)


def test_llama_3_1_keeps_the_fast_pairs_slows_the_slow_ones_and_mixes_between():
    plain, new = rope_frequencies(WIDE).double(), scaled(RopeScaling(8.0, 1.0, 4.0, 8192)).double()
    turns = 8192 * plain / (2 * math.pi)  # of each pair within the first 8,192 positions
    fast, slow = turns > 4, turns < 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    assert torch.equal(new[fast], plain[fast])
    assert torch.allclose(new[slow], plain[slow] / 8)
    share = (turns - 1) / (4 - 1)
    mixed = share * plain + (1 - share) * plain / 8
    between = ~(fast | slow)
    assert torch.allclose(new[between], mixed[between], rtol=1e-6)


def test_scaled_frequencies_still_fall_from_one_pair_to_the_next():
    assert (scaled(RopeScaling(32.0, 1.0, 4.0, 8192)).diff() < 0).all()


# --- how config.json says it ----------------------------------------------------------------------


@pytest.mark.parametrize("theta", [{"rope_theta": 5e5}, {}])
def test_both_spellings_of_a_scaling_mean_the_same(tmp_path, theta):
    old = read(tmp_path, rope_scaling=LLAMA_3_1, **theta)
    new = read(tmp_path, rope_parameters=LLAMA_3_1 | theta)
    both = read(tmp_path, rope_scaling=LLAMA_3_1, rope_parameters=LLAMA_3_1 | theta, **theta)
    assert old == new == both
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert old.rope_theta == theta.get("rope_theta", 1e4)


def test_linear_scaling_has_an_old_and_a_new_name_for_its_type(tmp_path):
    old = read(tmp_path, rope_scaling=LINEAR)
    new = read(tmp_path, rope_parameters={"rope_type": "linear", "factor": 4})
    assert old == new and old.rope_scaling == RopeScaling(4.0)


def test_linear_scaling_by_one_is_no_scaling(tmp_path):
    assert read(tmp_path, rope_scaling=LINEAR | {"factor": 1}).rope_scaling is None
    assert read(tmp_path, rope_scaling={"rope_type": "default"}).rope_scaling is None


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling(4.0), RopeScaling(32.0, 1.0, 4.0, 8192)], ids=str
)
def test_a_scaling_survives_being_written_and_read(tmp_path, scaling):
    cfg = dataclasses.replace(SMALL, rope_scaling=scaling)
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_json(torch.bfloat16)))
    assert LlamaConfig.from_json(tmp_path / "config.json") == cfg


def less(scaling, key):
    return {k: v for k, v in scaling.items() if k != key}


@pytest.mark.parametrize(
    "keys, named",
    [
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, kind)
            for kind in ("dynamic", "yarn", "longrope", "proportional", "mrope")
        ),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"factor": 2.0}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        *(({"rope_scaling": less(LLAMA_3_1, key)}, key) for key in LLAMA_3_1 if key != "rope_type"),
        ({"rope_scaling": LLAMA_3_1 | {"factor": 0.5}}, "factor"),
        ({"rope_scaling": LLAMA_3_1 | {"factor": "8"}}, "factor"),
        ({"rope_scaling": LLAMA_3_1 | {"high_freq_factor": 1.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA_3_1 | {"attention_factor": 1.2}}, "attention_factor"),
        ({"rope_scaling": LLAMA_3_1, "original_max_position_embeddings": 4096}, "4096"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta"),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 2.0}}, "factor"),
        ({"rope_parameters": LINEAR, "rope_scaling": LLAMA_3_1 | {"type": "llama3"}}, "factor"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
    ids=str,
)
def test_a_scaling_that_this_model_does_not_compute_is_refused_by_name(tmp_path, keys, named):
    with pytest.raises(CheckpointError, match=named):
        read(tmp_path, **keys)
