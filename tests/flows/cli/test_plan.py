"""`panda plan`: what it says before and after data exists, why a stage is to do, and that its numbers are exact."""

import json
import re
from pathlib import Path

import pytest

from configs.load import load
from configs.settings import PandaSettings
from data_prep.pipeline import prepare
from data_prep.plan.reader import open_plan
from data_prep.records.shard import shard_records
from data_prep.sample import write_sample
from data_prep.settings import CorpusSettings, PackSettings, TokenizeSettings
from data_prep.tokenizer import train_tokenizer
from flows.cli.main import main, train_main
from flows.cli.run_plan import Asked, CheckpointCost, RunPlan, as_json, make_plan, target_of
from flows.parts.run_dir import RunDir, write_config
from training.settings import TrainSettings
from training.tracking.throughput import Speed
from training.trainer.batches import batch_schedule


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with the sample corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.launch.commands.num_gpus", lambda: 0)
    write_sample(Path("dataset"))
    return tmp_path


def settings(**values):
    return load(values).settings


def prepare_as(chosen):
    """Prepare the data as a run would, and leave the configuration of that run."""
    corpus, cache = CorpusSettings.of(chosen), Path(chosen.cache_dir)
    tokenizer = train_tokenizer(shard_records(corpus, cache), chosen.architecture["vocab_size"], cache)
    planned = prepare(corpus, TokenizeSettings.of(chosen), PackSettings.of(chosen), tokenizer, cache)
    run = RunDir(Path(chosen.output_dir) / "first")
    run.path.mkdir(parents=True, exist_ok=True)
    paths = {"plan_dir": Path(planned.path), "tokenizer_dir": tokenizer, "model_dir": None, "run_dir": run.path}
    write_config(run, chosen, paths)
    return planned


def stages(plan: RunPlan) -> dict[str, tuple[bool, str]]:
    return {stage.name: (stage.reused, stage.why) for stage in plan.data.stages}


def test_before_anything_exists(workplace):
    plan = make_plan(settings())
    assert stages(plan)["records"] == (False, "nothing is prepared yet")
    assert not plan.data.exact
    assert plan.data.target_tokens is None
    assert plan.hours is None
    assert not (workplace / "cache").exists(), "a plan without data writes nothing"


def test_what_a_model_needs_can_be_asked_before_there_is_a_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", "llama-7b", "--gpu_memory_gb", "80", "--num_processes", "8"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "no corpus yet" in printed and "It fits" in printed and "rows" not in printed.replace("rows in", "")
    assert main([*words, "--pretraining_data_dir", "missing"]) == 2
    assert "missing does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "precision", "words"),
    [
        ("81559, 9.0", "auto", "2 GPUs, bfloat16, 85.5 GB each"),
        ("16384, 7.5", "auto", "2 GPUs, float32, 17.2 GB each"),  # it would emulate bfloat16
        ("16384, 7.5", "bf16", "2 GPUs, bfloat16, 17.2 GB each"),
        ("[N/A]", "auto", "2 GPUs, bfloat16"),
    ],
)
def test_gpus_are_asked_what_they_can(tmp_path, monkeypatch, answer, precision, words):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("training.launch.commands.num_gpus", lambda: 2)
    assert target_of(TrainSettings(precision=precision), None).words == words


def padding(plan_dir: str, chosen: PandaSettings) -> float:
    """Measured on the arrays that an epoch on two ranks trains on, as metrics.jsonl says it."""
    plan, train = open_plan(Path(plan_dir), "train"), TrainSettings.of(chosen)
    batches = batch_schedule(plan, train, world_size=2)
    computed = sum(
        plan.batch(rows).input_ids.size
        for step in range(batches.steps_per_epoch)
        for rank in (0, 1)
        for rows in batches.micro_batches(step, rank, 2, train.per_gpu_train_batch_size)
    )
    return 1 - float(plan.row_tokens.sum()) / computed


def test_padding_of_rows_that_are_not_packed(workplace):
    """Each is as long as its micro-batch, not as max_seq_length."""
    chosen = settings(packing=False)
    assert make_plan(chosen).course.padding is None, "nothing is known of the lengths yet"
    planned = prepare_as(chosen)
    found = make_plan(chosen).course.padding
    assert found == pytest.approx(padding(planned.path, chosen), abs=1e-12)
    assert found < 1 - planned.report["utilisation"]


def test_estimates_come_near_and_numbers_are_exact_afterwards(workplace):
    chosen = settings()
    estimated = make_plan(chosen)
    planned = prepare_as(chosen)
    exact = make_plan(chosen, Asked(tokens_per_second=1000.0))
    assert [reused for reused, _ in stages(exact).values()] == [True, True, True]
    assert exact.data.exact
    assert exact.data.rows == planned.report["rows"]
    assert exact.course.target_tokens == planned.report["target_tokens"]
    rows_per_step = 4 * 2 * 2  # micro-batch, accumulation, ranks
    assert exact.course.steps == -(-planned.report["rows"] // rows_per_step)
    assert exact.course.padding == pytest.approx(padding(planned.path, chosen), abs=1e-12)
    assert exact.hours == pytest.approx(planned.report["tokens"] / 1000 / 3600)
    assert exact.device_hours == pytest.approx(2 * exact.hours) and exact.price is None
    assert estimated.data.tokens == pytest.approx(planned.report["tokens"], rel=1), "the right size"


def test_what_the_training_costs_and_that_its_hours_will_not_do(workplace, capsys):
    prepare_as(settings())
    words = ["--tokens_per_second", "1", "--price_per_gpu_hour", "2", "--currency", "EUR", "--max_gpu_hours", "1"]
    assert main(["plan", *words]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    plan = make_plan(settings(price_per_gpu_hour=2.0), Asked(tokens_per_second=1.0))
    assert plan.price == pytest.approx(2 * 2 * plan.course.tokens / 3600)
    assert f"price of training {plan.price:,.2f} EUR" in printed
    assert f"rank-hours (CPU) of training {plan.device_hours:,.4g}; max_gpu_hours=1 will end training before" in printed


def test_estimates_from_a_sample_of_the_records(workplace):
    prepare_as(settings())
    chosen = settings(template="alpaca")
    estimated = make_plan(chosen).data
    planned = prepare_as(chosen).report
    duplicates = planned["dropped"]["duplicate"] / planned["accepted"]
    assert not estimated.exact
    assert estimated.tokens == pytest.approx(planned["tokens"], rel=0.1 + duplicates)
    assert estimated.target_tokens == pytest.approx(planned["target_tokens"], rel=0.1 + duplicates)


def test_why_a_stage_is_to_do(workplace):
    prepare_as(settings())
    plan = make_plan(settings(template="alpaca"))
    assert stages(plan)["tokens"] == (False, "template: plain -> alpaca")
    assert stages(plan)["records"] == (True, "")
    longer = make_plan(settings(max_seq_length=1024))
    assert stages(longer)["tokens"] == (True, "")
    assert stages(longer)["plan"] == (False, "max_seq_length: 512 -> 1024; made just now")
    assert longer.data.exact
    Path("dataset/pretraining/more.jsonl").write_text('{"title": "t", "content": "more text"}\n')
    new = make_plan(settings())
    assert stages(new)["records"] == (False, "1 new file (more.jsonl)")
    with Path("dataset/pretraining/stories.jsonl").open("a") as stream:
        stream.write('{"title": "t", "content": "and more"}\n')
    both = make_plan(settings())
    assert stages(both)["records"][1] == "1 new file (more.jsonl), 1 changed file (stories.jsonl)"


def test_the_speed_of_an_earlier_run(workplace):
    chosen = settings()
    prepare_as(chosen)
    lines = [json.dumps({"step": step, "tokens_per_second": speed}) for step, speed in enumerate((1, 90, 100, 110), 1)]
    (workplace / "outputs" / "first" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    plan = make_plan(chosen)
    assert plan.speed == Speed(100, "run first")
    assert make_plan(settings(use_lora=True)).speed is None, "that run trained in another way"


def test_whether_a_stop_leaves_time_for_a_checkpoint(workplace):
    assert make_plan(settings()).checkpoint.in_time is None, "nothing has been measured"
    folder = workplace / "outputs" / "first" / "checkpoints" / "step-000004"
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"files": {"state": {"bytes": 10**8}}, "seconds": 2.0}))
    plan = make_plan(settings())
    size = 12 * plan.needs.trainable
    assert plan.checkpoint == CheckpointCost(size, size / 5e7, "run first", in_time=True)
    assert not make_plan(settings(stop_deadline_seconds=0.001)).checkpoint.in_time


def test_what_fits(workplace, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    seven = make_plan(settings(model="llama-7b", num_processes=1), Asked(24))
    assert seven.needs.parameters == 6_738_415_616
    assert not as_json(seven)["fits"]
    assert seven.needs.memory.total > 100e9
    assert seven.needs.change.settings
    assert seven.needs.change.memory.total <= 0.95 * 24e9
    adapter = make_plan(settings(model="llama-7b", preset="qlora", num_processes=1), Asked(24))
    assert as_json(adapter)["fits"]
    assert adapter.needs.memory.total < 16e9


def test_what_does_not_work_together(workplace, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = ["plan", "--model", "llama-7b", "--use_quant", "--use_lora", "false", "--offload_parameters", "--json"]
    assert main(command) == 2
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [problem.split(":")[0] for problem in plan["problems"]] == [
        "use_quant without use_lora",
        "offload_parameters without zero_stage 3",
    ]


def test_the_json_has_the_keys_of_the_guide(workplace, monkeypatch):
    """Also while the model's configuration is out of reach: what is not known is null."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    known = as_json(make_plan(settings()))
    unknown = as_json(make_plan(settings(ckpt_path="nobody/nothing")))
    assert known.keys() == unknown.keys()
    assert {"memory", "phases", "fits", "checkpoint"} <= {name for name, value in unknown.items() if value is None}
    section = (Path(__file__).parents[3] / "docs" / "guide.md").read_text(encoding="utf-8").split("## `panda plan`")[1]
    first_cells = re.findall(r"^\| (`.*?) \|", section.split("\n## ")[0], re.MULTILINE)
    assert len(first_cells) > 10
    assert set(re.findall(r"`(\w+)`", " ".join(first_cells))) <= known.keys()


def test_a_phase_that_does_not_fit_is_named(workplace, capsys):
    """A step that fits is not all: checkpoints are copied to CPU memory, evaluation has a batch of its own."""
    flags = ["plan", "--model", "llama-7b", "--num_processes", "8", "--gpu_memory_gb", "80", "--gradient_checkpointing"]
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fits"], "nothing is known of CPU memory"
    assert main([*flags, "--host_memory_gb", "80", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [phase["name"] for phase in plan["phases"] if not phase["fits"]] == ["train", "save"], "copied beside a step"
    assert plan["change"]["flags"] == "--use_lora true"
    assert main([*flags, "--per_gpu_eval_batch_size", "2000"]) == 0
    shown = capsys.readouterr().out
    assert "Too large on a rank: evaluate" in shown and "Too large on a rank: train" not in shown
    assert "The smallest change that does: --per_gpu_eval_batch_size 1 " in shown


def test_exact_names_the_phases_that_do_not_fit(workplace, capsys):
    flags = ["plan", "--model", "panda-tiny", "--exact", "--num_processes", "4"]
    assert main([*flags, "--gpu_memory_gb", "80", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out.splitlines()[-1])["exact"]
    assert [phase["name"] for phase in exact["phases"]] == ["load", "step", "evaluate", "save", "export"]
    assert exact["fits"] and [phase["sent"] > 0 for phase in exact["phases"]] == [False, True, True, False, False]
    assert main([*flags, "--gpu_memory_gb", "1.1"]) == 0
    shown = capsys.readouterr().out
    assert "rank 0 of 4 GPUs, bfloat16, 1.1 GB each" in shown
    (step,) = (line for line in shown.splitlines() if "forward, backward, update" in line)
    (save,) = (line for line in shown.splitlines() if "a copy of the shards" in line)
    assert "does not fit" in step and "does not fit" not in save


def test_dry_run_is_the_plan(workplace, capsys):
    assert train_main(["--model", "panda-tiny", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert main(["plan", "--model", "panda-tiny"]) == 0
    assert capsys.readouterr().out == shown
    assert "nothing is prepared yet" in shown
    assert "The settings work together." in shown
    assert not (workplace / "outputs").exists()
