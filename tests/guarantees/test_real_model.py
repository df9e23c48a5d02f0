"""The lesson on a real pretrained model, on a small stand-in: it runs, goes on, and draws."""

import json
import sys

from conftest import ROOT, write_checkpoint, write_records

sys.path.insert(0, str(ROOT / "lessons"))
import real_model

SHORT = ["--ranks", "2", "--steps", "2", "--batch-size", "2", "--val-size", "2"]


def test_every_cell_is_run_once_and_tabulated_and_a_second_call_runs_what_is_missing(
    tmp_path, capsys
):
    base = write_checkpoint(tmp_path / "base")
    records, results = write_records(tmp_path / "records.json"), tmp_path / "results.jsonl"
    files = ["--records", str(records), "--results", str(results), "--figures", str(tmp_path)]
    command = ["--ckpt", str(base), *files, *SHORT, "--device", "cpu"]
    assert real_model.main(command) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    cells = [real_model.job_of(row) for row in rows]
    assert cells == real_model.plan([2])
    assert {method for method, _, _ in cells} == {"rora", "lora", "dora"}
    assert all(len(row["loss"]) == 2 and row["val_loss"] > 0 for row in rows)
    assert (tmp_path / "real_model.png").read_bytes().startswith(b"\x89PNG")
    results.write_text("".join(results.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert real_model.main(command) == 0
    said = capsys.readouterr().out
    assert f"{len(rows) - 1} runs are done, 1 to do" in said and said.count("| RoRA |") == 4
