"""The whole pipeline as a user runs it: real Prefect, two real DeepSpeed ranks, real MLflow, on the sample corpus."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from data_prep.sample import write_sample
from tests.support import warm
from tests.support.mlflow_fixtures import load_and_generate
from tests.support.real_corpora import REAL
from tests.training.registry.test_register import greedy

ROOT = Path(__file__).parents[2]
SMALL = ["--max_seq_length", "128", "architecture.num_hidden_layers=2", "architecture.vocab_size=1024"]


def train(folder: Path, *arguments: str) -> tuple[dict, str]:
    """Run train.py from another directory with a Prefect database of its own; returns (summary, stderr)."""
    env = {**os.environ, **warm.environment(), "PREFECT_HOME": str(folder / "prefect")}
    done = warm.run([sys.executable, str(ROOT / "train.py"), "--json", *arguments], folder, env, 1500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("end-to-end")
    write_sample(path / "dataset")
    return path


@pytest.fixture(scope="module")
def first(folder):
    return train(folder, "--model", "panda-tiny", "--max_steps", "12", "--save_steps", "6", *SMALL)[0]


@pytest.mark.distributed
class TestFirstRun:
    def test_every_record_is_accounted_for(self, first):
        data = first["data"]
        assert data["records_in"] == 1000 + 6 + 800 + 1 + 100
        assert data["records_in"] == data["accepted"] + sum(data["rejected"].values()) + sum(data["dropped"].values())
        assert data["rejected"] == {
            "empty_target": 1, "malformed_json": 1, "missing_field": 1, "unknown_shape": 1, "wrong_type": 1,
        }  # fmt: skip
        assert data["dropped"]["duplicate"] >= 1

    def test_held_out_loss_falls(self, first):
        losses = first["losses"]
        assert set(losses["before"]) == set(losses["after"])
        assert all(losses["after"][source] < losses["before"][source] - 0.5 for source in losses["before"])

    def test_a_line_of_metrics_for_every_step(self, first):
        lines = [json.loads(line) for line in (Path(first["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 13))
        wanted = {"step", "loss", "learning_rate", "target_tokens", "tokens", "seconds", "grad_norm"}
        assert all(wanted <= line.keys() for line in lines)
        assert lines[-1]["loss"] < lines[0]["loss"]

    def test_summary_is_the_printed_object(self, first):
        assert json.loads((Path(first["run_dir"]) / "summary.json").read_text()) == first

    def test_registered_model_generates(self, first):
        assert first["model"]["name"] == "panda-panda-tiny"
        assert str(first["model"]["version"]) == "1"
        assert isinstance(first["model"]["sample"], str)

    def test_the_first_version_is_the_champion(self, first):
        assert first["gate"]["promoted"] and first["gate"]["records"] > 20
        assert "nothing to compare it with" in first["gate"]["reasons"][0]

    def test_the_version_says_what_it_was_made_of(self, first, folder):
        import mlflow

        uri = f"sqlite:///{folder}/outputs/mlflow.db"
        client = mlflow.MlflowClient(uri, uri)  # the registry's may be that of another test
        version = client.get_model_version(first["model"]["name"], "1")
        tags = version.tags
        plan = yaml.safe_load((Path(first["run_dir"]) / "config.yaml").read_text())["paths"]["plan_dir"]
        assert tags["panda.plan"] == Path(plan).name and len(tags["panda.config"]) == 32
        assert float(tags["eval_loss.all"]) == pytest.approx(first["losses"]["after"]["all"], abs=1e-5)
        assert tags["prefect.flow_run_id"] == first["prefect_flow_run_id"]
        run = client.get_run(first["mlflow_run_id"])
        digests = {one.dataset.name: one.dataset.digest for one in run.inputs.dataset_inputs}
        corpus, plan = tags["panda.corpus"], tags["panda.plan"]
        assert digests == {"instruction": corpus, "pretraining": corpus, "held-out": plan}
        assert run.data.tags["mlflow.source.name"] == "train.py" and run.data.tags["mlflow.user"]
        loss = f"{first['losses']['before']['all']:.4f} | {first['losses']['after']['all']:.4f}"
        for description in (run.data.tags["mlflow.note.content"], version.description):
            assert "| records in | 1,907 |" in description and loss in description
            assert "It is the champion now" in description and first["run_dir"] in description
        names = {file.path for path in (None, "report") for file in client.list_artifacts(first["mlflow_run_id"], path)}
        wanted = {"config.yaml", "gate.json", "report/data.json", "report/corpus.json", "report/environment.json"}
        assert wanted | {"metrics.jsonl", "report/loss.png", "report/gate_records.jsonl"} <= names

    def test_metrics_are_in_mlflow(self, first, folder):
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
        run = client.get_run(first["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(first["mlflow_run_id"], "loss")) == 12
        assert run.data.params["max_steps"] == "12"

    def test_kept_checkpoints_and_the_registered_model_are_ranked(self, first, folder):
        import mlflow

        client = mlflow.MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
        experiment = client.get_run(first["mlflow_run_id"]).info.experiment_id
        models = client.search_logged_models([experiment], order_by=[{"field_name": "metrics.eval/eval_loss"}])
        steps = [model.params.get("step") for model in models]
        assert len(models) == 3 and set(steps[:2]) == {None, "12"} and steps[2] == "6"  # step 6 was not evaluated
        best = {metric.key: metric for metric in models[0].metrics}["eval/eval_loss"]
        assert best.value == pytest.approx(first["losses"]["after"]["all"], abs=1e-5)
        assert best.dataset_name == "held-out"


@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_documents_only_and_nothing_held_out(folder):
    """The guide's pretraining case; all other cases are in `test_every_run_is_registered.py`."""
    summary, _ = train(
        folder, "--model", "panda-tiny", "--instruction_tuning_data_dir", "null", "--validation_fraction", "0",
        "--max_steps", "2", "--registered_model_name", "documents", *SMALL,
    )  # fmt: skip
    assert (
        summary["model"]["uri"] == "models:/documents/1" and summary["model"]["prompt"] and summary["model"]["sample"]
    )
    assert summary["losses"] == {"before": {}, "after": {}}
    assert summary["gate"]["promoted"] and "it was not asked either" in summary["gate"]["reasons"][0]


@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_second_run_reuses_prepared_data_and_adds_a_version(first, folder):
    second, _ = train(folder, "--model", "panda-tiny", "--max_steps", "2", *SMALL)
    assert all(second["data"]["reused"].values())
    assert int(second["model"]["version"]) == int(first["model"]["version"]) + 1
    assert second["data"]["records_in"] == first["data"]["records_in"]
    assert not second["gate"]["promoted"] and second["gate"]["champion"] == first["model"]["uri"]
    assert "lower bound must be above promote_min_gain" in second["gate"]["reasons"][0]


@pytest.mark.distributed
def test_the_first_losses_are_reproduced_bit_by_bit(first, folder):
    command = [sys.executable, "-m", "flows.cli.main", "reproduce", first["model"]["uri"], "--steps", "3", "--json"]
    done = warm.run(command, folder, {**os.environ, **warm.environment()})
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert again["bitwise"] and again["data_rebuilt"] and again["steps"] == [1, 2, 3] and not again["environment"]


@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_from_stage_repeats_only_what_follows(first, folder):
    run_dir = Path(first["run_dir"])
    kept = [path for path in (run_dir / "logs").iterdir() if path.name.startswith(("rank-", "evaluate-"))]
    logs = {path.name: path.stat().st_mtime_ns for path in kept}
    again, _ = train(folder, "--run_name", run_dir.name, "--from_stage", "register")
    assert again["model"]["version"] == first["model"]["version"]
    assert again["losses"] == first["losses"]
    assert logs == {name: (run_dir / "logs" / name).stat().st_mtime_ns for name in logs}


@pytest.mark.distributed
def test_a_resumed_run_has_the_settings_it_had(first, folder):
    command = [sys.executable, str(ROOT / "train.py"), "--resume", "--run_name", Path(first["run_dir"]).name]
    command += ["--learning_rate", "0.5", "--print_config"]
    shown = warm.run(command, folder).stdout.splitlines()
    origins = {line.split(":")[0]: line.split("# ")[-1] for line in shown}
    config = f"{first['run_dir']}/config.yaml"
    assert (origins["max_steps"], origins["learning_rate"], origins["until_stage"]) == (config, "flag", "flag")
    assert "max_steps: 12 " in "\n".join(shown)


@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_lora_on_a_checkpoint(first, folder):
    summary, _ = train(
        folder, "--ckpt_path", f"{first['run_dir']}/model", "--use_lora", "--lora_r", "4",
        "--max_steps", "2", "--gradient_accumulation_steps", "1", "--max_seq_length", "128", "--run_name", "lora",
    )  # fmt: skip
    names = {path.name for path in (Path(summary["run_dir"]) / "model").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    assert summary["gate"]["base"] == f"{first['run_dir']}/model"
    assert {row["against"] for row in summary["gate"]["slices"]} == {"base"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
def test_an_adapter_on_four_bits_is_registered_and_merged_into_whole_weights(first, folder):
    from transformers import AutoModelForCausalLM

    summary, _ = train(
        folder, "--ckpt_path", f"{first['run_dir']}/model", "--use_lora", "--use_quant", "--lora_r", "4",
        "--max_steps", "4", "--learning_rate", "0.01", "--gradient_accumulation_steps", "1", "--max_seq_length", "128",
        "--num_processes", "1", "--run_name", "qlora", "--registered_model_name", "four-bits",
    )  # fmt: skip
    version = summary["model"]["uri"]
    assert version == "models:/four-bits/1"
    command = [sys.executable, "-m", "flows.cli.main", "export", version, "exported", "--json"]
    done = warm.run(command, folder)
    assert done.returncode == 0, done.stderr
    exported = json.loads(done.stdout.splitlines()[-1])
    assert exported["kind"] == "streamed" and exported["difference"]["top1_agreement"] == 1
    merged = AutoModelForCausalLM.from_pretrained(folder / "exported")
    said = greedy(merged, folder / "exported", "hello", 24)
    assert said == load_and_generate(version, "hello", 24, f"sqlite:///{folder}/outputs/mlflow.db")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.usefixtures("use_prefect_server")
@pytest.mark.skipif(not REAL.is_dir(), reason="the real corpora are not on this machine (PANDA_REAL_CORPORA)")
def test_real_corpora(tmp_path):
    summary, _ = train(
        tmp_path, "--model", "panda-tiny", "--instruction_tuning_data_dir", str(REAL / "instruction_tuning"),
        "--pretraining_data_dir", str(REAL / "pretraining"), "--max_seq_length", "512", "--max_steps", "4",
    )  # fmt: skip
    data = summary["data"]
    assert data["records_in"] == 2390
    assert data["records_in"] == data["accepted"] + sum(data["rejected"].values()) + sum(data["dropped"].values())
