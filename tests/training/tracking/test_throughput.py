"""The speed of earlier runs, as MLflow knows it: from runs as tracking writes them, and without an answer none."""

import json
import os
from pathlib import Path

from training.launch.processes import free_port
from training.settings import TrackingSettings, TrainSettings
from training.tracking.run import RunMetadata, open_run
from training.tracking.throughput import DiskSpeed, past_disk_speed, past_speed


def test_the_speed_of_a_run_of_the_same_kind_is_found(run_dir, tmp_path):
    with open_run(TrackingSettings(), run_dir, RunMetadata({"model": "panda-tiny", "use_lora": False})) as tracked:
        (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens_per_second": 120.0}) + "\n")
    here = TrackingSettings(mlflow_tracking_uri=tracked.uri)
    found = past_speed(tmp_path / "nothing", TrainSettings(model="panda-tiny"), here)
    assert found.tokens_per_second == 120.0 and found.source == "MLflow run run-1"
    assert past_speed(tmp_path / "nothing", TrainSettings(model="panda-tiny", use_lora=True), here) is None


def test_a_server_that_is_down_is_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = TrackingSettings(mlflow_tracking_uri=f"http://me:hunter2@127.0.0.1:{free_port()}")
    assert past_speed(Path("nothing"), TrainSettings(model="panda-tiny"), away) is None
    assert "not known" in caplog.text and "hunter2" not in caplog.text


def test_the_speed_of_the_newest_large_checkpoint(tmp_path):
    assert past_disk_speed(tmp_path) is None
    for step, size, seconds in ((1, 80_000_000, 4.0), (2, 120_000_000, 2.0), (3, 1000, 0.1), (4, 90_000_000, None)):
        folder = tmp_path / "weekly" / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        marker = {"files": {"state": {"bytes": size}}, **({"seconds": seconds} if seconds else {})}
        (folder / "complete.json").write_text(json.dumps(marker))
        os.utime(folder / "complete.json", (step, step))
    assert past_disk_speed(tmp_path) == DiskSpeed(60e6, "run weekly")
