"""The list of `make gpu-check` goes through a tiny model on the CPU; a line that fails stops no other."""

import json
import subprocess
import sys

import pytest
import torch

from tests.support.tiny import ROOT
from training.gpu_check import __main__ as gpu_check
from training.gpu_check import device as on_device
from training.gpu_check.lines import Found, Line, NotAvailable, line_of

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_list_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "training.gpu_check", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line["name"]: line for line in json.loads(done.stdout.splitlines()[-1])["lines"]}
    needs_gpu = {"GPUs", "attention flash_attention_2", "attention flex_attention", "memory"}
    assert {name for name, line in lines.items() if line["status"] == "not available"} == needs_gpu
    assert {line["status"] for name, line in lines.items() if name not in needs_gpu} == {"pass"}
    assert lines["resume"]["measured"] == "from step 4: bit-equal"
    assert lines["communication"]["measured"].startswith("gloo between 2 ranks")


def test_a_line_that_fails_stops_no_other_and_is_the_exit_code(monkeypatch, capsys):
    def leaky(*_):
        raise RuntimeError("segments are not isolated\nand more")

    monkeypatch.setattr(on_device, "attention_kind", leaky)
    all_checks = gpu_check.checks
    monkeypatch.setattr(gpu_check, "checks", lambda shop: list(all_checks(shop))[:8])
    assert gpu_check.main([]) == 1
    shown = capsys.readouterr().out.splitlines()
    failed = [line for line in shown if "fail" in line]
    assert len(failed) == 5 and "RuntimeError: segments are not isolated" in failed[0]
    assert any(line.startswith("fused AdamW") and "pass" in line for line in shown), "it comes after them"


def test_what_a_line_says():
    def missing():
        raise NotAvailable("no such kernel")

    assert line_of("a", missing) == Line("a", "not available", "no such kernel")
    assert line_of("b", lambda: Found("2 s", "1 s", good=False)) == Line("b", "fail", "2 s", "1 s")
    assert line_of("c", lambda: 1 // 0).status == "fail"


def test_a_leak_between_segments_fails_its_line(monkeypatch):
    """Attention that sees the segments before: as with a kernel that takes no notice of positions."""
    monkeypatch.setattr(on_device.attention, "segment_sizes", lambda positions: [positions.numel()])
    assert "not isolated" in line_of("segments", lambda: on_device.attention_kind("segments", CPU)).measured
    monkeypatch.undo()
    assert line_of("segments", lambda: on_device.attention_kind("segments", CPU)).status == "pass"
