"""Benchmarks: what lm-eval is asked and what becomes of its answer; with lm-eval itself by `pytest -m extra`."""

import json
from pathlib import Path

import pytest

from tests.support.tiny_models import save_adapter, save_full_model
from tests.training.registry.test_register import tracked_run
from training.export.export import Exported
from training.lean_imports import without
from training.registry.benchmark import (
    BenchmarkError,
    Questions,
    Score,
    ask,
    item_values,
    model_args,
    record,
    scores_of,
)
from training.registry.publish import CardFacts, model_card
from training.registry.register import register
from training.registry.versions import Registry

REPORT = {
    "results": {
        "arc": {"alias": "arc", "sample_len": 20, "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.3,
                "acc_norm_stderr,none": "N/A"},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.0},
    },
    "n-shot": {"arc": 25, "gsm8k": 5},
    "n-samples": {"arc": {"original": 100, "effective": 20}, "gsm8k": {"original": 8, "effective": 8}},
}  # fmt: skip
SCORES = [
    Score("arc", "acc", 0.25, 0.1, 25, 20, 100),
    Score("arc", "acc_norm", 0.3, None, 25, 20, 100),
    Score("gsm8k", "exact_match/strict-match", 0.5, 0.0, 5, 8, 8),
]


def test_scores_are_read_from_lm_evals_report():
    assert list(scores_of(REPORT)) == SCORES


def test_an_adapter_is_asked_on_its_base(tmp_path):
    save_full_model(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    whole, base, adapter = str(tmp_path / "base"), tmp_path / "base", tmp_path / "adapter"
    asked = model_args(base, None)
    assert asked["pretrained"] == asked["tokenizer"] == whole and "peft" not in asked
    assert not asked["trust_remote_code"]
    asked = model_args(adapter, None)
    assert (asked["pretrained"], asked["peft"], asked["tokenizer"]) == (whole, str(adapter), str(adapter))
    assert model_args(adapter, tmp_path / "moved")["pretrained"] == str(tmp_path / "moved")


def test_without_lm_eval_the_command_that_installs_it_is_said(tmp_path):
    with without("lm_eval"), pytest.raises(BenchmarkError, match=r"not installed: pip install 'lm-eval>="):
        ask(tmp_path, Questions(["arc"]))


@pytest.mark.usefixtures("load_back_here")
def test_scores_are_with_the_version_the_run_and_in_the_card(run_dir):
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    uri = register(run_dir, tracked.run_id, "panda-tiny", {}, tracked.uri).uri
    registry = Registry(tracked.uri)
    for _ in range(2):  # asking again replaces what was there
        record(registry, registry.resolve(uri), SCORES, {"config": {"url": "http://me:hunter2@host"}})
    version = registry.resolve(uri)
    assert version.benchmarks == {
        "arc": "acc 0.2500 ± 0.1000, 25-shot, 20 of 100 records; acc_norm 0.3000, 25-shot, 20 of 100 records",
        "gsm8k": "exact_match/strict-match 0.5000 ± 0.0000, 5-shot, 8 of 8 records",
    }
    assert registry.client.get_run(version.run_id).data.metrics["benchmark/gsm8k/exact_match/strict-match"] == 0.5
    stored = registry.artifact(version, "benchmarks/arc-gsm8k.json")
    assert json.loads(stored)["scores"][0]["value"] == 0.25 and "hunter2" not in stored
    assert "| gsm8k | exact_match/strict-match 0.5000" in model_card(
        CardFacts(uri, version.tags), Exported("x", "copied")
    )


TASK = """
task: sky
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(directory: Path) -> None:
    """A task of one's own, whose data lie beside it."""
    file = directory / "sky.jsonl"
    question = {"question": "hello", "choices": [" world", " xyzzy"]}
    file.write_text("".join(json.dumps({**question, "answer": answer}) + "\n" for answer in (0, 0, 0, 1)))
    (directory / "sky.yaml").write_text(TASK.format(file=file))


@pytest.mark.extra
def test_lm_eval_itself_on_a_task_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    save_full_model(tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "adapter")
    write_task(tmp_path)
    for model_dir in (tmp_path / "base", tmp_path / "adapter"):
        ((score,), report) = ask(model_dir, Questions(["sky"], task_dir=tmp_path))
        assert (score.task, score.metric, score.shots, score.records) == ("sky", "acc", 0, 4)
        assert score.value in (0.25, 0.75) and report["lm_eval_version"]
    values, texts = item_values(tmp_path / "base", "sky", {"task_dir": str(tmp_path), "limit": 3}, False)
    assert len(values) == 3 and set(values) <= {0.0, 1.0} and texts == ["hello"] * 3
    with pytest.raises(BenchmarkError, match="gate_benchmarks: sky: no 'f1' of single records; there is acc"):
        item_values(tmp_path / "base", "sky", {"task_dir": str(tmp_path), "metric": "f1"}, False)
    with pytest.raises(BenchmarkError, match="no task 'skye'; did you mean sky"):
        ask(tmp_path / "base", Questions(["skye"], task_dir=tmp_path))
