"""The worker as a process: what it refuses, how it stops, what it deploys, its golden loss curve."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support import tiny
from tests.support.plans import example, write_plan
from training.launch.processes import free_port

GOLDEN = Path(__file__).parents[1] / "assets" / "golden-losses.json"


def failed(run_dir: Path, code: int, world_size: int = 1, *arguments: str) -> str:
    """Run, expect an exit code, return what the ranks said."""
    assert tiny.wait(tiny.start(run_dir, world_size, *arguments)) == [code] * world_size, tiny.logs(run_dir)
    return tiny.logs(run_dir)


def test_golden_losses(tmp_path):
    """20 steps; bitwise twice on one machine, close across machines. New values: UPDATE_GOLDEN=1 pytest -k golden."""
    settings = {"max_steps": 20, "max_grad_norm": 0.5, "weight_decay": 0.1}
    once, again = (tiny.losses(tiny.train(tiny.write_run(tmp_path, name, **settings), 1)) for name in ("a", "b"))
    assert once == again
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(once, indent=1) + "\n")
    assert once == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)
    assert once[-1] < once[0] - 1


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_records(tmp_path):
    run = tiny.write_run(tmp_path, learning_rate=1e25, lr_scheduler="constant", save_steps=1)
    said = failed(run, 84, 2)
    assert "is not finite; no update was made" in said or "no update was made. Look at these records" in said
    assert "memory.json:" in said
    assert "step 2:" in said
    weights = load_file(run / "checkpoints" / "step-000001" / "state-00000-00000.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_keep_best_deploys_the_best_and_patience_ends_the_run(tmp_path):
    """A learning rate that ruins the model after a few steps: the best held-out loss comes early."""
    run = tiny.write_run(
        tmp_path, max_steps=40, eval_steps=2, keep_best=True, early_stop_patience=2, keep_last=1,
        learning_rate=0.3, lr_scheduler="warmup", warmup_steps=30, adam_betas=[0.5, 0.9],
    )  # fmt: skip
    lines = tiny.train(run, 1)
    evaluations = tiny.metrics(run, "evaluations.jsonl")
    summary = json.loads((run / "train.json").read_text())
    in_loop = {line["step"]: line["eval_loss"] for line in evaluations[1:-1]}
    assert len(lines) < 40, "stopped early"
    assert summary["best_step"] == min(in_loop, key=in_loop.get) < len(lines)
    assert summary["eval_after"]["all"]["loss"] == pytest.approx(in_loop[summary["best_step"]], rel=1e-6)
    assert (run / "checkpoints" / f"step-{summary['best_step']:06d}").exists()


def test_a_run_directory_with_checkpoints_is_not_overwritten(tmp_path):
    run = tiny.write_run(tmp_path, max_steps=2)
    tiny.train(run, 1)
    assert "step-000002 is there already: --resume goes on from it" in failed(run, 81)
    tiny.train(run, 1, "--resume")


def test_settings_that_cannot_work_are_refused_in_one_line(tmp_path):
    said = failed(tiny.write_run(tmp_path, optimizer="LAMB", zero_stage=2), 81)
    assert "Instead: --zero_stage 0 or --strategy fsdp" in said
    assert "Traceback" not in said


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    base = tiny.write_run(tmp_path, "base", max_steps=1)
    tiny.train(base, 1)
    run = tiny.write_run(tmp_path, model_dir=base / "model")
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["one more"] = tiny.VOCABULARY
    tokenizer.write_text(json.dumps(content))
    assert "65 tokens, but the model has only 64 embeddings" in failed(run, 81)


def test_a_plan_without_rows_is_an_error_of_data(tmp_path):
    plan = write_plan(tmp_path / "cache", [example([3], [4])], max_seq_length=8, rows=[])
    assert "no rows to train on" in failed(tiny.write_run(tmp_path, plan_dir=plan), 82)


@pytest.mark.distributed
def test_torchrun_by_hand(tmp_path):
    run = tiny.write_run(tmp_path, max_steps=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()),
        "-m", "training.worker", "--config", str(run / "config.yaml"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("PANDA ")]
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2]
    assert events[-1]["event"] == "done"


def test_your_own_optimizer_schedule_and_callbacks(tmp_path):
    run = tiny.write_run(
        tmp_path, max_steps=3, zero_stage=0,
        optimizer={"_target_": "users_functions.scaled_sgd", "factor": 2.0},
        lr_scheduler={"_target_": "users_functions.halving", "start": 1.0},
        callbacks=[{"_target_": "users_functions.note", "path": str(tmp_path / "noted")}],
    )  # fmt: skip
    lines = tiny.train(run, 1)
    assert [line["learning_rate"] for line in lines] == [0.01, 0.005, 0.0025]
    assert (tmp_path / "noted").read_text() == "1\n2\n3\n"


@pytest.mark.distributed
def test_evaluation_of_what_was_deployed(tmp_path):
    """The numbers of training, once the weights on disk have given the losses of a sample again; or all of it anew."""
    run = tiny.write_run(tmp_path, max_steps=3)
    tiny.train(run, 1)
    trained = json.loads((run / "train.json").read_text())
    assert evaluated(run, 2) == trained["eval_after"]
    everything = evaluated(run, 1, "--all")
    assert everything.keys() == trained["eval_after"].keys()
    assert everything["all"]["loss"] == pytest.approx(trained["eval_after"]["all"]["loss"], rel=1e-5)
    weights = run / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"] *= -3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert tiny.wait(tiny.start(run, 1, module="training.evaluate")) == [81]
    assert "RUN/model is not the model that was trained" in tiny.logs(run)


def evaluated(run_dir: Path, world_size: int, *arguments: str) -> dict:
    """What the process writes."""
    codes = tiny.wait(tiny.start(run_dir, world_size, *arguments, module="training.evaluate"))
    assert codes == [0] * world_size, tiny.logs(run_dir)
    return json.loads((run_dir / "evaluation.json").read_text())


def test_unpacked_rows_train_the_same_example_losses(tmp_path):
    """The same examples one a row and two a row: the losses of a whole epoch as one step are equal."""
    losses = {}
    for segments in (1, 2):
        root = tmp_path / str(segments)
        plan = tiny.write_counting_plan(root / "cache", num_rows=16 // segments, segments=segments)
        run = tiny.write_run(
            root, plan_dir=plan, max_steps=1, per_gpu_train_batch_size=4, gradient_accumulation_steps=4
        )
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "packing": segments > 1}))
        losses[segments] = tiny.losses(tiny.train(run, 1))
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
