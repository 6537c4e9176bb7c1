"""`llmd check`: what would happen, without serving."""

import json
from pathlib import Path

import pytest

from llmd.cli import main


def test_it_prints_what_serve_would_do(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_model_dir), "--max-model-len", "256", "--max-num-seqs", "2"]) == 0
    printed = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in printed.splitlines() if not line.startswith(" "))
    assert rows["family"] == "LlamaForCausalLM"
    assert "context 256 tokens" in rows["memory"]
    assert "2 sequences" in rows["batch"]
    # the template's own words around a message
    assert json.loads(rows["template"].partition("becomes ")[2]).startswith("<|im_start|>user\nHello")


def test_what_would_stop_serve_stops_it(tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tiny_model_dir), "--max-model-len", "100000"]) == 1
    assert "--max-model-len 100000 is more than the model allows: 512" in capsys.readouterr().err
