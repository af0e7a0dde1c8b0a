"""benchmarks/on_real_weights.sh: what it refuses, and its comparison with transformers."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config

from ptjax.data.tokenizer import load_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_script_says_what_it_needs(tmp_path):
    for arguments, code, said in (
        (["--help"], 0, "NAME: a T5 on the Hugging Face hub"),
        ([], 2, "on_real_weights.sh: give a NAME; see --help"),
        (["a", "b"], 2, "on_real_weights.sh: two names; see --help"),
    ):
        command = [BENCHMARKS / "on_real_weights.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.oracle
def test_parity_holds_on_random_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    real_weights = importlib.import_module("real_weights")
    tokenizer = load_tokenizer("package:nano")
    folder = save_tiny(tmp_path / "t5", tiny_config(8192), tokenizer=tokenizer)
    found = real_weights.parity(str(folder), None, tmp_path)
    assert found["relative_difference"] < real_weights.MOST_DIFFERENCE
    assert found["generated_equal"] and found["texts"] == 4
    (tmp_path / "parity.json").write_text(json.dumps(found))
    (tmp_path / "sst2").mkdir()
    results = {"majority": 0.509, "before": 0.5, "value": 0.9}
    (tmp_path / "sst2" / "results.json").write_text(json.dumps(results))
    *_, tuned, published = real_weights.table("t5", tmp_path).splitlines()
    assert tuned == "| SST-2 validation, the tuned prompt | 0.900 |"
    assert published.startswith("| published: SST-2 ") and published.endswith(" | 0.951 |")
