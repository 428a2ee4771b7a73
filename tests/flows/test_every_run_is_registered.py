"""A table of small whole runs through register and gate: every corpus, tokenizer, way of training, first and second.

The flow, MLflow and the Prefect server are real. The ranks, the evaluation and the comparison run in this process (on
one rank they do the same there), because a process of its own each would take many minutes.
"""

import gc
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from prefect.settings import temporary_settings
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from configs.settings import PandaSettings
from data_prep.errors import CorpusError, PandaError
from data_prep.plan.reader import open_plan
from flows.cli import run as report
from flows.cli.run import call_flow
from flows.panda_evaluate import panda_evaluate
from flows.report import page
from tasks import alarm, prepare, reporting
from tasks import register as tasks_sample_prompt
from tests.support.ranks_here import running_here
from tests.support.tiny_models import save_tokenizer
from tests.training.registry.test_register import older_key
from training import evaluate
from training.launch import commands, launcher
from training.launch.run_config import read_config
from training.registry import loaded_back
from training.registry.promotion import promote
from training.registry.versions import Registry, Version
from training.tracking import plots

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("flow_in_this_process", "ranks_in_this_process")]

NUM_RECORDS = 60
INSTRUCTIONS = [{"instruction": f"Add {i} and {i + 1}.", "output": f"{2 * i + 1}"} for i in range(NUM_RECORDS)]
DOCUMENTS = [{"title": f"Number {i}", "content": f"{i} is the number after {i - 1}."} for i in range(NUM_RECORDS)]
CORPORA = {  # instructions, documents, share that is held out
    "instructions only": (INSTRUCTIONS, [], 0.6),
    "documents only": ([], DOCUMENTS, 0.6),
    "both": (INSTRUCTIONS, DOCUMENTS, 0.4),
    "one record": ([], DOCUMENTS[:1], 0.02),
    "nothing held out": (INSTRUCTIONS, DOCUMENTS, 0.0),
}
KINDS = {
    "whole": {},
    "lora": {"use_lora": True, "lora_r": 2},
    "4 bits": {"use_lora": True, "lora_r": 2, "use_quant": True, "strategy": "deepspeed"},
}
SETTINGS = {
    "max_steps": 1, "max_seq_length": 64, "num_processes": 1, "num_workers": 0, "gradient_accumulation_steps": 1,
    "per_gpu_train_batch_size": 2, "per_gpu_eval_batch_size": 32, "strategy": "fsdp", "prepare_workers": 1,
    "gate_records": 40, "model": "panda-tiny",
}  # fmt: skip


@pytest.fixture
def flow_in_this_process(use_prefect_server, prefect_server):
    """Prefect reads its address once, when it is imported: here it may have been long ago."""
    with temporary_settings(prefect_server.settings):
        yield


@pytest.fixture
def ranks_in_this_process(monkeypatch):
    """Where the launcher would start one process, its work is done here."""

    modules = (commands.WORKER, commands.EVALUATE, commands.LOAD_BACK, commands.COMPARE)
    here = running_here(*modules)

    def run_here(*arguments):
        try:
            return here(*arguments)
        finally:
            forget_groups()

    monkeypatch.setattr(launcher, "run_commands", run_here)
    gc.freeze()  # the comparison collects garbage after every model, a second each among all that is imported here
    yield
    gc.unfreeze()


def forget_groups() -> None:
    """DeepSpeed keeps its process groups as long as a process lives, in which it expects to train once."""
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        importlib.reload(groups)
        comm.cdb = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Corpora and two base models."""
    root = tmp_path_factory.mktemp("every-run")
    for name, (instructions, documents, _) in CORPORA.items():
        for kind, records in (("instructions", instructions), ("documents", documents)):
            path = root / name / kind / "records.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(records))
    for bos in (True, False):
        save_base(root / f"bos={bos}", bos)
    return root


def save_base(directory: Path, bos: bool) -> None:
    """A Llama of random weights whose tokenizer puts a bos before a text, or has none."""
    tokenizer = save_tokenizer(directory)
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        start = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[start])
        tokenizer.save_pretrained(directory)
    assert len(AutoTokenizer.from_pretrained(directory)("").input_ids) == int(bos)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def run(folder: Path, corpus: str, bos: bool, **settings) -> dict:
    """One run of the flow; its summary."""
    instructions, documents, share = CORPORA[corpus]
    absent = {"instruction_tuning_data_dir": not instructions, "pretraining_data_dir": not documents}
    return call_flow({
        **SETTINGS,
        "ckpt_path": str(folder / f"bos={bos}"),
        "instruction_tuning_data_dir": str(folder / corpus / "instructions"),
        "pretraining_data_dir": str(folder / corpus / "documents"),
        "validation_fraction": share,
        "output_dir": str(folder / "outputs"),
        "cache_dir": str(folder / "cache"),
        "overrides": [f"{name}=null" for name, is_absent in absent.items() if is_absent],
        **{name: None for name, is_absent in absent.items() if is_absent},
        **settings,
    })  # fmt: skip


PAIRS = [
    pytest.param(corpus, bool((row + column) % 2), kind, id=f"{corpus}-{kind}")
    for row, corpus in enumerate(CORPORA)
    for column, kind in enumerate(KINDS)
]
"""Every corpus with every kind of weights, each of them with a tokenizer that has a bos and with one that has none."""


@pytest.mark.parametrize(("corpus", "bos", "kind"), PAIRS)
def test_first_and_second_version(corpus, bos, kind, folder):
    """Each is compared with what there is; where nothing can be, that is said, and the version is there as well."""
    name = f"{corpus}-{bos}-{kind}".replace(" ", "-")
    here = Registry(f"sqlite:///{folder}/outputs/mlflow.db")
    for number, against in ((1, {"base"}), (2, {"base", "champion"})):
        which = {"registered_model_name": name, "run_name": f"{name}-{number}", "seed": number}
        summary = run(folder, corpus, bos, **which, **KINDS[kind])
        model, gate = summary["model"], summary["gate"]
        assert model["version"] == number == len(here.versions(name))
        assert model["prompt"].startswith("Add " if CORPORA[corpus][0] else "Number ") and model["sample"]
        held_out = corpus not in ("one record", "nothing held out")
        nothing = "no record is held out (validation_fraction), so nothing can be compared"
        assert gate["records"] >= 15 if held_out else gate["reasons"] == [nothing]
        assert {row["against"] for row in gate["slices"]} == (against if held_out else set())
        assert not gate["problems"] and bool(summary["losses"]["after"]) == held_out
        promote(here, model["uri"], despite_gate=True)


def test_new_tokens_are_in_the_version_and_its_records(folder):
    """From the corpus to what is loaded back: one word for the tokenizer, a row of each end for the adapter."""
    asked = {"use_lora": True, "lora_r": 2, "use_dora": True, "add_tokens": ["is the number after"]}
    summary = run(folder, "documents only", True, run_name="tokens", registered_model_name="tokens", **asked)
    assert summary["gate"]["records"] >= 15 and not summary["gate"]["problems"] and summary["model"]["sample"]
    run_dir = Path(summary["run_dir"])
    num_old = len(AutoTokenizer.from_pretrained(folder / "bos=True"))
    version = AutoTokenizer.from_pretrained(run_dir / "model")
    assert len(version) == num_old + 1 and version("3 is the number after 2").input_ids.count(num_old) == 1
    ids = open_plan(Path(read_config(run_dir / "config.yaml").plan_dir), "train").batch(np.array([0])).input_ids
    assert (ids == num_old).any()
    rows = {name for name in load_file(run_dir / "model" / "adapter_model.safetensors") if "tokens_delta" in name}
    assert len(rows) == 2, "embedding and output layer"


def test_that_nothing_is_held_out_is_said_wherever_losses_are_shown(folder, capsys):
    summary = run(folder, "one record", True, registered_model_name="silence", run_name="silence")
    report.show(summary, PandaSettings(output_dir=str(folder / "outputs")))
    assert "no record is held out (validation_fraction)" in capsys.readouterr().out
    where = {"output_dir": str(folder / "outputs"), "run_name": "silence"}
    assert panda_evaluate(**where, return_state=True).message == "no record is held out (validation_fraction)"


def test_instructions_that_say_nothing(folder, tmp_path):
    """Only the answers have text, and the tokenizer has no bos: no token stands before them."""
    records = [{"instruction": "", "output": f"Answer {i}."} for i in range(NUM_RECORDS)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    where = {"instruction_tuning_data_dir": str(tmp_path), "run_name": "silent"}
    summary = run(folder, "instructions only", False, registered_model_name="silent", **where)
    assert summary["model"]["prompt"].startswith("Answ") and summary["model"]["sample"]
    assert summary["gate"]["records"] > 15 and len(
        json.loads((Path(summary["run_dir"]) / "gate.json").read_text())["answers"]["base"]
    )


def test_a_champion_whose_files_are_gone_costs_the_promotion_only(folder):
    name = {"registered_model_name": "gone"}
    here = Registry(f"sqlite:///{folder}/outputs/mlflow.db")
    first = here.resolve(run(folder, "both", True, run_name="gone-1", **name)["model"]["uri"])
    promote(here, first.uri, despite_gate=True)
    shutil.rmtree(here.files(first, folder / "cache"))
    gate = run(folder, "both", True, run_name="gone-2", seed=2, **name)["gate"]
    assert not gate["promoted"] and gate["reasons"][0].startswith(f"the champion {first.uri} cannot be asked: ")
    assert here.champion("gone").version == 1


def test_a_corpus_that_has_changed_stops_the_run_until_a_person_says_otherwise(folder, tmp_path):
    name = {"registered_model_name": "watched"}
    first = run(folder, "instructions only", True, run_name="watched-1", **name)
    assert first["corpus_alarm"]["note"] == "no champion yet, so there is no corpus to compare with"
    promote(Registry(f"sqlite:///{folder}/outputs/mlflow.db"), first["model"]["uri"], despite_gate=True)
    again = run(folder, "instructions only", True, run_name="watched-2", seed=2, **name)
    assert again["corpus_alarm"] == {"compared_with": first["model"]["uri"], "note": "", "findings": []}

    (tmp_path / "records.json").write_text(json.dumps([one | {"output": "No idea."} for one in INSTRUCTIONS]))
    broken_feed = {"instruction_tuning_data_dir": str(tmp_path), "run_name": "watched-3", **name}
    with pytest.raises(
        CorpusError, match=r"the corpus has changed .*--resume --run_name watched-3 --corpus_alarm warn"
    ):
        run(folder, "instructions only", True, corpus_alarm="stop", **broken_feed)
    assert not (folder / "outputs" / "watched-3" / "metrics.jsonl").exists()
    where = {"resume": True, "run_name": "watched-3", "output_dir": str(folder / "outputs")}
    resumed = call_flow({**where, "corpus_alarm": "warn"})
    assert "one answer to many prompts" in {one["measure"] for one in resumed["corpus_alarm"]["findings"]}
    assert resumed["model"]["version"] == 3 and resumed["training"]["steps"] == 1
    told = (Path(resumed["run_dir"]) / "report.html").read_text()
    assert "The corpus has changed" in told and "one answer to many prompts" in told and "No idea." in told
    here = Registry(f"sqlite:///{folder}/outputs/mlflow.db").client
    assert "report.html" in {file.path for file in here.list_artifacts(resumed["mlflow_run_id"])}


def broken(*_, **__):
    raise RuntimeError("broken")


def test_no_look_at_a_model_costs_it(folder, monkeypatch, caplog):
    """All that is only to be looked at fails: artifacts, plots, examples, prompt, sample text, description."""
    for name in ("create_table_artifact", "create_markdown_artifact", "create_image_artifact", "write_plots"):
        monkeypatch.setattr(reporting, name, broken)
    for module, name in ((prepare, "inspect_plan"), (plots, "write_plots"), (loaded_back, "generate"),
                         (tasks_sample_prompt, "open_plan"), (Registry, "describe"), (alarm, "take_profile"),
                         (page, "render")):  # fmt: skip
        monkeypatch.setattr(module, name, broken)
    summary = run(folder, "both", False, registered_model_name="unseen", run_name="unseen")
    assert summary["outcome"]["name"] == "Completed" and summary["model"]["version"] == 1
    assert summary["model"]["prompt"] == summary["model"]["sample"] == ""
    looks = ("the data report", "the examples", "the curves", "the table of losses", "a prompt to try the model on",
             "a text of the model", "the artifact of the model", "the links", "the artifact of the gate",
             "the description of models:/unseen/1", "the plots of", "the corpus alarm", "report.html of")  # fmt: skip
    assert [look for look in looks if f"going on without {look}" not in caplog.text] == []


def test_what_fails_in_the_evaluation_goes_on_from_there(folder, monkeypatch):
    """No step is trained again, nothing loaded by a trainer, no model written anew."""
    where = {"output_dir": str(folder / "outputs"), "run_name": "evaluated"}
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_for_inference", broken)
        with pytest.raises(PandaError, match="broken"):
            run(folder, "both", True, registered_model_name="evaluated", run_name="evaluated")
    run_dir = folder / "outputs" / "evaluated"
    files = (run_dir / "train.json", run_dir / "metrics.jsonl", run_dir / "model" / "model.safetensors")
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]
    monkeypatch.setattr("training.trainer.run.train_run", broken)
    summary = call_flow({"resume": True, **where})
    assert summary["model"]["version"] == 1 and summary["training"]["steps"] == 1 and summary["losses"]["after"]
    assert before == [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]


def test_settings_that_ask_for_more_steps_go_on_training(folder):
    name = {"run_name": "more", "registered_model_name": "more"}
    assert run(folder, "both", True, **name)["training"]["steps"] == 1
    resumed = call_flow({"resume": True, "run_name": "more", "output_dir": str(folder / "outputs"), "max_steps": 2})
    assert resumed["training"]["steps"] == 2 and resumed["model"]["version"] == 2


def test_killed_in_the_gate_by_older_code_and_resumed_by_newer_it_is_one_version(folder, monkeypatch):
    """What the older code left is made by hand from a whole run: its key, no step, no verdict."""
    name = {"registered_model_name": "upgraded", "run_name": "upgraded"}
    here = Registry(f"sqlite:///{folder}/outputs/mlflow.db")
    first = run(folder, "both", True, **name)
    run_dir = Path(first["run_dir"])
    as_older_code_left_it(here, here.resolve(first["model"]["uri"]), run_dir)

    (run_dir / "train.json").unlink()  # older code, killed in the gate, is followed by training that has nothing to do

    def newer(_config, directory: Path) -> None:
        (directory / "chat_template.jinja").write_text("{# newer #}")

    monkeypatch.setattr("training.trainer.run.save_chat_template", newer)
    resumed = call_flow({"resume": True, "run_name": "upgraded", "output_dir": str(folder / "outputs")})
    assert (run_dir / "model" / "chat_template.jinja").read_text() == "{# newer #}"  # other bytes than registered
    (version,) = here.versions("upgraded")
    assert resumed["model"]["uri"] == first["model"]["uri"] == version.uri
    assert version.tags["panda.gate"] in ("passed", "failed") and version.tags["panda.step"] == "1"


def as_older_code_left_it(here: Registry, version: Version, run_dir: Path) -> None:
    """The key was a hash of run and bytes; there was no step; the process died before the verdict."""
    client, key = here.client, older_key(version.run_id, run_dir / "model")
    logged = version.source.removeprefix("models:/")
    client.set_logged_model_tags(logged, {"panda.key": key})
    client.delete_logged_model_tag(logged, "panda.step")
    client.set_model_version_tag(version.name, str(version.version), "panda.key", key)
    for tag in ("panda.step", "panda.gate", "panda.gate.reasons"):
        client.delete_model_version_tag(version.name, str(version.version), tag)
    for alias in version.aliases:
        client.delete_registered_model_alias(version.name, alias)
    for file in ("summary.json", "gate.json"):
        (run_dir / file).unlink()


UNUSABLE = {  # records, settings, what is said
    "all rejected": ([{"nonsense": 1}] * 3, {}, r"3 of 3 records are rejected, more than max_rejected_fraction=0.1"),
    "all too long": ([{"instruction": "Say a. " * 50, "output": "a"}], {}, r"none is in the training rows .* overflow"),
    "all held out": (INSTRUCTIONS[:1], {"validation_fraction": 0.9999}, r"held out 1\).*validation_fraction"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_corpus_with_nothing_to_train_on_is_an_error_that_names_the_settings(case, folder, tmp_path):
    records, settings, said = UNUSABLE[case]
    (tmp_path / "records.json").write_text(json.dumps(records))
    with pytest.raises(CorpusError, match=said):
        run(folder, "instructions only", True, run_name="unusable",
            **{"instruction_tuning_data_dir": str(tmp_path), **settings})  # fmt: skip
    assert not (folder / "outputs" / "unusable").exists()
