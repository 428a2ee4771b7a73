"""The gate on several ranks, and adapters switched on one base: what it finds is what one process found before."""

import json
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from tests.support import tiny
from tests.support.corpora import Project
from tests.support.ranks_here import alone
from training import compare
from training.compare import run_job
from training.comparison.job import Job, ModelUnderTest, write_job
from training.engines.inference import UsedModel
from training.launch.run_config import read_config
from training.models.build import Empty, load_deployed
from training.models.deferred import Values
from training.settings import GateSettings

RECORDS, NEUTRAL_TEXTS = 24, 100


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with its base and two adapters of it, which differ."""
    root = tmp_path_factory.mktemp("gate")
    output_dir = root / "outputs"
    output_dir.mkdir()
    project = Project(root, output_dir)
    run = project.train("run-1", 1)
    for seed, name in enumerate(("candidate", "champion"), 1):
        save_adapter(run / "model", root / name, seed)
    write_job(job_of(run), run)
    return run


def save_adapter(base_dir: Path, directory: Path, seed: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from training.models.build import copy_tokenizer

    model = get_peft_model(load_deployed(base_dir), LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    copy_tokenizer(str(base_dir), directory)


def job_of(run_dir: Path) -> Job:
    root, base = run_dir.parents[1], str(run_dir / "model")
    return Job(
        gate=GateSettings(gate_records=RECORDS).model_dump(),
        cache_dir=str(root / "cache"),
        candidate=ModelUnderTest("candidate", "plain", str(root / "candidate")),
        champion=ModelUnderTest("champion", "plain", str(root / "champion")),
        base=ModelUnderTest("base", "plain", base),
    )


def lines_of(run_dir: Path) -> list[dict]:
    text = (run_dir / "report" / "gate_records.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def expected(run_dir) -> tuple[list[dict], dict]:
    """Records and answers, each model loaded by itself, without ranks: what the gate did before."""
    config, job = read_config(run_dir / "config.yaml"), job_of(run_dir)
    losses: list[dict] = []
    answers = {}
    for role, one in job.models.items():
        alone_in_the_gate = replace(job, candidate=one, champion=None, base=None)
        with pytest.MonkeyPatch.context() as patch, alone() as ranks:
            whole = Empty(load_deployed(one.files), Values())
            patch.setattr(compare, "empty_weights", lambda *_, whole=whole: whole)
            patch.setattr(compare, "put_adapter", lambda *_: None)
            patch.setattr(UsedModel, "speaking_as", lambda *_: nullcontext())
            result = run_job(config, alone_in_the_gate, ranks)
        answers[role] = result["answers"]["candidate"]
        losses = losses or [{**line, "loss": {}} for line in lines_of(run_dir)]
        for line, found in zip(losses, lines_of(run_dir), strict=True):
            line["loss"][role] = found["loss"]["candidate"]
    assert len(losses) == RECORDS + NEUTRAL_TEXTS and losses[0]["loss"]["candidate"] != pytest.approx(
        losses[0]["loss"]["base"]
    )
    assert losses[0]["loss"]["candidate"] != pytest.approx(losses[0]["loss"]["champion"])
    return losses, answers


def same_losses(found: list[dict], expected: list[dict]) -> None:
    for line, wanted in zip(found, expected, strict=True):
        assert line["hash"] == wanted["hash"] and line["target_tokens"] == wanted["target_tokens"]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-6, abs=2e-6)


def test_the_base_is_loaded_once_for_its_adapters(run_dir, expected, monkeypatch):
    loaded = []
    original = compare.empty_weights
    monkeypatch.setattr(compare, "empty_weights", lambda *args: loaded.append(args[0]) or original(*args))
    with alone() as ranks:
        result = run_job(read_config(run_dir / "config.yaml"), job_of(run_dir), ranks)
    assert loaded == [run_dir / "model"]
    same_losses(lines_of(run_dir), expected[0])
    assert result["answers"] == expected[1] and not result["problems"]


def test_an_adapter_that_cannot_be_loaded_costs_its_role_only(run_dir, expected, tmp_path):
    job = job_of(run_dir)
    (tmp_path / "adapter_config.json").write_text((job.champion.files / "adapter_config.json").read_text())
    job = replace(job, champion=replace(job.champion, model_dir=str(tmp_path)))
    with alone() as ranks:
        result = run_job(read_config(run_dir / "config.yaml"), job, ranks)
    assert list(result["problems"]) == ["champion"] and not result["promoted"]
    assert result["answers"]["base"] == expected[1]["base"]


def test_weights_are_gone_before_others_are_loaded(run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir / "model", tmp_path / "other")
    job = job_of(run_dir)
    job = replace(job, champion=replace(job.champion, model_dir=str(tmp_path / "other")), base=None)
    used, alive = [], []
    make, load = compare.in_use, compare.empty_weights

    def remembered(*arguments):
        model = make(*arguments)
        used.append(weakref.ref(model))
        return model

    def looked_at(*arguments):
        alive.append(sum(one() is not None for one in used))
        return load(*arguments)

    monkeypatch.setattr(compare, "in_use", remembered)
    monkeypatch.setattr(compare, "empty_weights", looked_at)
    with alone() as ranks:
        assert not run_job(read_config(run_dir / "config.yaml"), job, ranks)["problems"]
    assert alive == [0, 0] and len(used) == 2


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(run_dir, expected):
    codes = tiny.wait(tiny.start(run_dir, 2, module="training.compare"))
    assert codes == [0, 0], tiny.logs(run_dir)
    same_losses(lines_of(run_dir), expected[0])
    assert json.loads((run_dir / "gate.json").read_text())["answers"] == expected[1]
