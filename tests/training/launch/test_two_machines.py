"""Two machines with their own addresses train together, lose each other in every way, and go on to the same losses."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.support import tiny
from tests.support.two_machines import ADDRESSES, Machines, two_machines

STEPS = 300
STALL_SECONDS = 60  # three times that for the start, on a busy machine
MACHINE_0 = """
import json, sys
from pathlib import Path
from training.launch.launcher import launch
from training.launch.run_config import read_config
run_dir = Path(sys.argv[1])
settings = read_config(run_dir / "config.yaml").settings
report = launch(run_dir, settings, lambda event: None, print, resume=sys.argv[2] == "resume")
(run_dir / "report.json").write_text(json.dumps(report.as_dict()))
"""


@pytest.mark.extra
@pytest.mark.timeout(3000)
def test_train_together_and_lose_each_other(tmp_path):
    settings = {"strategy": "fsdp", "max_steps": STEPS, "save_steps": 5}
    alone, run_dir = (tiny.write_run(tmp_path, name, **settings) for name in ("alone", "run"))
    together = {"nodes": 2, "node_rank": 0, "master_addr": ADDRESSES[0], "num_processes": 1}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, **together, "stall_seconds": STALL_SECONDS}))
    with two_machines() as machines:
        both = start(machines, run_dir)
        machines.cable(1, "down")
        report = report_of(run_dir, both[0])
        assert report["message"].startswith("no sign of progress for 6") and report["retry_helps"], report
        machines.cable(1, "up")
        assert both[1].wait(5 * STALL_SECONDS), "it hears that the others are gone"
        assert not machines.processes(0) and not machines.processes(1)

        both = start(machines, run_dir)
        machines.power_off(1)
        report = report_of(run_dir, both[0])
        assert report["reason"] == "lost_rank" and report["retry_helps"], report
        machines.cable(1, "up")

        both = start(machines, run_dir)
        machines.power_off(0)
        assert both[1].wait(5 * STALL_SECONDS), "nobody tells it anything; it stops waiting"
        assert not machines.processes(1)
        machines.cable(0, "up")

        both = start(machines, run_dir, wait=False)
        assert report_of(run_dir, both[0])["reason"] == "completed", tiny.logs(run_dir / "logs")
        assert both[1].wait(5 * STALL_SECONDS) == 0
    assert tiny.wait(tiny.start(alone, 2), seconds=900) == [0, 0], tiny.logs(alone)
    assert tiny.losses(tiny.metrics(run_dir)) == tiny.losses(tiny.metrics(alone))


def start(machines: Machines, run_dir: Path, wait: bool = True) -> list[subprocess.Popen]:
    """Both machines, as docs/multi-node.md says; then wait until they have got a checkpoint further."""
    before = checkpoints(run_dir)
    resume = ["--resume"] if before else []
    agent = [
        *["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1"],
        *["--max-restarts", "0", "--master-addr", ADDRESSES[0], "--master-port", "29500"],
        *["-m", "training.worker", "--config", str(run_dir / "config.yaml"), *resume],
    ]
    words = [["-c", MACHINE_0, str(run_dir), "resume" if before else "begin"], agent]
    (run_dir / "report.json").unlink(missing_ok=True)
    both = []
    for number, command in enumerate(words):
        with (run_dir / f"rank-{number}.log").open("a") as log:
            both.append(machines.run(number, *command, output=log))
    while wait and checkpoints(run_dir) <= before:
        assert all(one.poll() is None for one in both), tiny.logs(run_dir)
        time.sleep(0.01)
    return both


def checkpoints(run_dir: Path) -> int:
    """The step of the newest one that is complete; 0 = none."""
    return max((int(path.parent.name[5:]) for path in run_dir.glob("checkpoints/step-*/complete.json")), default=0)


def report_of(run_dir: Path, machine: subprocess.Popen) -> dict:
    assert machine.wait(600) == 0, tiny.logs(run_dir)
    return json.loads((run_dir / "report.json").read_text())
