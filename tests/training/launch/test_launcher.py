"""Launching: real ranks that end in every way there is; how that is reported and that nothing is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import yaml

from training.launch.commands import Machine, rank_commands, using_commands
from training.launch.exits import ExitReason, reason_of_code, reason_of_error
from training.launch.launcher import Listener, launch_worker, smaller_micro_batch
from training.launch.logs import Watchdog
from training.launch.processes import free_port
from training.settings import TrainSettings

ROOT = Path(__file__).parents[3]
WORKER = "tests.support.ranks"
MARK = "PANDA_TEST_MARK"


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    """Processes are counted before and after every test; all it starts inherit a mark, wherever they go."""
    monkeypatch.setenv(MARK, uuid.uuid4().hex)
    me = psutil.Process()
    before = {child.pid for child in me.children(recursive=True)}
    yield
    assert {child.pid for child in me.children(recursive=True)} <= before
    assert not ranks_alive()


def ranks_alive() -> list[int]:
    """Pids of processes this test has started, or they, wherever they hang in the tree now."""
    me = os.getpid()
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get(MARK) == os.environ[MARK]
            if marked and process.pid != me and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def run(tmp_path: Path, behaviour: dict[int, str], on_event=None, resume=False, lines=None, **settings):
    """Launch two ranks that behave so; (report, events, log lines)."""
    config = {"behaviour": behaviour, "per_gpu_train_batch_size": 8, "gradient_accumulation_steps": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    events, lines = [], [] if lines is None else lines
    values = TrainSettings(**{"num_processes": 2, "stop_deadline_seconds": 1, **settings})
    report = launch_worker(WORKER, tmp_path, values, Listener(on_event or events.append, lines.append), resume)
    return report, events, lines


def test_completed(tmp_path):
    report, events, lines = run(tmp_path, {}, resume=True)
    assert report.reason is ExitReason.completed and report.reason.code == 0 and not report.retry_helps
    assert {event["rank"] for event in events if event["event"] == "hello"} == {0, 1}
    assert all(event["resume"] for event in events if event["event"] == "hello")
    assert sum(event["event"] == "step" for event in events) == 6
    assert "[rank-1] step 2 of rank 1" in lines
    assert "step 2 of rank 0" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_events_are_found_behind_lines_that_others_have_begun(tmp_path):
    _, events, lines = run(tmp_path, {0: "begin_lines", 1: "begin_lines"})
    assert sum(event["event"] == "step" for event in events) == 6
    assert lines.count("[rank-0] half a line") == 3 and "[rank-0] " not in lines


@pytest.mark.parametrize("other", ["ignore_sigterm", "spawn_daemons", "crash_as_peer"])
def test_the_traceback_of_the_rank_that_failed_is_shown_at_once(tmp_path, other):
    report, _, _ = run(tmp_path, {0: other, 1: "crash"}, stop_deadline_seconds=60)
    assert report.reason is ExitReason.infrastructure and report.retry_helps
    assert report.source == "rank-1" and report.message == "the true cause"
    assert "Traceback" in report.details and "def crash" not in report.details
    assert 'raise RuntimeError("the true cause")' in report.details
    assert report.seconds < 60


@pytest.mark.parametrize(
    ("behaviour", "reason", "words"),
    [
        ("kill_itself", ExitReason.lost_rank, "was killed by SIGKILL"),
        ("crash_in_c", ExitReason.lost_rank, "was killed by SIGSEGV"),
        ("bad_data", ExitReason.data, "dataset/a.json line 7"),
        ("not_finite", ExitReason.non_finite, "loss is nan in step 3"),
        ("always_out_of_memory", ExitReason.out_of_memory, "no batch is small enough"),
    ],
)
def test_reasons(tmp_path, behaviour, reason, words):
    report, _, _ = run(tmp_path, {0: "ignore_sigterm", 1: behaviour})
    assert report.reason is reason and words in report.message and report.source == "rank-1"
    assert report.retry_helps == (reason is ExitReason.lost_rank)
    if behaviour == "crash_in_c":
        assert "Segmentation fault" in report.details and "string_at" in report.details


def test_out_of_memory_goes_on_with_a_smaller_micro_batch(tmp_path):
    report, events, lines = run(tmp_path, {1: "need_small_batch"})
    assert report.reason is ExitReason.completed and report.micro_batch_halvings == 2
    shrunk = [event for event in events if event["event"] == "out_of_memory"]
    assert [event["per_gpu_train_batch_size"] for event in shrunk] == [4, 2]
    assert [event["gradient_accumulation_steps"] for event in shrunk] == [8, 16]
    assert [event["resume"] for event in events if event.get("rank") == 1] == [False, True, True]
    assert any("out of memory" in line for line in lines)


def test_out_of_memory_can_be_left_alone(tmp_path):
    report, _, _ = run(tmp_path, {1: "need_small_batch"}, halve_batch_on_out_of_memory=False)
    assert report.reason is ExitReason.out_of_memory and report.message == "micro-batch 8"


def test_smaller_micro_batches_keep_the_rows_of_a_step():
    assert smaller_micro_batch(8, 4) == (4, 8)
    assert smaller_micro_batch(3, 4) == (1, 12)
    assert smaller_micro_batch(6, 1) == (3, 2)
    assert smaller_micro_batch(1, 64) is None


def test_a_stall_is_ended_with_the_stacks_of_all_ranks(tmp_path):
    report, _, _ = run(tmp_path, {0: "stall", 1: "stall"}, stall_seconds=5, stop_deadline_seconds=60)
    assert report.reason is ExitReason.lost_rank and "no sign of progress" in report.message
    assert report.details.count("a_function_that_hangs") == 2 and "[rank-1]" in report.details
    assert report.seconds < 60


def test_the_watchdog_allows_ten_median_steps():
    now = [0.0]
    watchdog = Watchdog(5, clock=lambda: now[0])
    now[0] = 14
    assert not watchdog.overdue()  # three floors before the first sign of life
    for step in range(4):
        watchdog.progress({"step": step})
        now[0] += 2
    assert watchdog.allowance == 20 and not watchdog.overdue()
    now[0] += 19
    assert watchdog.overdue() == 21
    assert Watchdog(0, clock=lambda: now[0]).overdue() == 0


class Cancelled(BaseException):
    """What Prefect raises in the middle of a task is no Exception either."""


def test_cancelling_lets_the_ranks_write_their_checkpoint(tmp_path):
    def cancel(event):
        if event["event"] == "step":
            raise Cancelled

    lines = []
    with pytest.raises(Cancelled):
        run(tmp_path, {0: "obey_sigterm", 1: "obey_sigterm"}, on_event=cancel, lines=lines, stop_deadline_seconds=20)
    assert (tmp_path / "stopped-0").exists() or (tmp_path / "stopped-1").exists()
    assert any(line.endswith("] checkpoint written") for line in lines), "their last words are told"


def test_ranks_that_ignore_cancelling_are_killed(tmp_path):
    def cancel(event):
        if event["event"] == "step":
            time.sleep(1)  # let the daemons start
            raise Cancelled

    started = time.monotonic()
    with pytest.raises(Cancelled):
        run(tmp_path, {0: "spawn_daemons", 1: "ignore_sigterm"}, on_event=cancel, stop_deadline_seconds=1)
    assert time.monotonic() - started < 60


PARENT = """
import sys
from pathlib import Path
from training.launch.launcher import Listener, launch_worker
from training.settings import TrainSettings
settings = TrainSettings(num_processes=2, stop_deadline_seconds=2)
launch_worker(sys.argv[2], Path(sys.argv[1]), settings, Listener(print, print), False)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("behaviour", ["spawn_daemons", "obey_sigterm"])
def test_nothing_survives_the_parent(tmp_path, behaviour, how):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"behaviour": {0: behaviour, 1: behaviour}}))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), WORKER], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(ranks_alive()) >= (8 if behaviour == "spawn_daemons" else 4), 60)
    wait_until(lambda: all('"step"' in log.read_text() for log in (tmp_path / "logs").glob("*.log")), 60)
    parent.send_signal(how)
    parent.wait()
    wait_until(lambda: not ranks_alive(), 60)
    if behaviour == "obey_sigterm":
        assert (tmp_path / "stopped-0").exists() and (tmp_path / "stopped-1").exists()


@pytest.mark.parametrize("behaviour", ["spawn_daemons", "ignore_sigterm"])
def test_nothing_survives_the_supervisor(tmp_path, behaviour):
    killed = []

    def kill_supervisor(event):
        if event["event"] == "step" and not killed:
            time.sleep(1)
            killed.extend(
                child for child in psutil.Process().children() if "training.launch.supervisor" in child.cmdline()
            )
            killed[0].kill()

    report, _, _ = run(tmp_path, {0: behaviour, 1: "obey_sigterm"}, on_event=kill_supervisor)
    assert report.reason is ExitReason.lost_rank and "supervisor" in report.message


def wait_until(condition, timeout_seconds: float) -> None:
    """Return once the condition holds; fail after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not come true in time"
        time.sleep(0.05)


def test_a_flood_of_lines_is_limited_in_the_log_but_not_in_the_file(tmp_path):
    report, _, lines = run(tmp_path, {0: "talk_a_lot"})
    assert report.reason is ExitReason.completed
    assert len(lines) < 300 and any("left out" in line for line in lines)
    assert (tmp_path / "logs" / "rank-0.log").read_text().count("\n") == 20_002


def test_a_second_start_shows_only_its_own_lines(tmp_path):
    run(tmp_path, {1: "crash"})
    report, _, lines = run(tmp_path, {1: "kill_itself"}, resume=True)
    assert "the true cause" not in report.details and not any("Traceback" in line for line in lines)
    assert "the true cause" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_a_rank_that_ends_before_the_next_is_started_is_reported(tmp_path):
    """Else the supervisor would wait for it for ever."""
    program = (
        "import os, sys\n"
        "from training.launch import supervisor\n"
        "start = supervisor.start\n"
        "def ended(command):\n"
        "    process = start(command)\n"
        "    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)\n"
        "    return process\n"
        "supervisor.start = ended\n"
        "log = sys.argv[1]\n"
        "commands = [{'name': str(i), 'argv': ['true'], 'env': {}, 'log': log} for i in range(3)]\n"
        "supervisor.supervise(commands, 1, supervisor.Control())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log")], cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((fact["name"], fact["code"]) for fact in facts if fact["event"] == "exited") == [
        ("0", 0), ("1", 0), ("2", 0)
    ]  # fmt: skip


MACHINE = Machine(num_gpus=0, num_cores=8, free_port=4321)


def test_direct_commands(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    first, second = rank_commands(tmp_path, TrainSettings(), MACHINE, resume=True)
    assert first.argv == [sys.executable, "-m", "training.worker", "--config", f"{tmp_path}/config.yaml", "--resume"]
    assert second.env["RANK"] == second.env["LOCAL_RANK"] == "1" and second.env["WORLD_SIZE"] == "2"
    assert second.env["MASTER_PORT"] == "4321" and second.env["OMP_NUM_THREADS"] == "4"
    assert second.log == f"{tmp_path}/logs/rank-1.log"
    assert len(rank_commands(tmp_path, TrainSettings(), Machine(4, 8, 1), resume=False)) == 4
    assert len(rank_commands(tmp_path, TrainSettings(num_processes=3), Machine(4, 8, 1), resume=False)) == 3


def test_what_uses_the_weights_runs_on_the_ranks_of_this_machine(tmp_path):
    """Also where several machines have trained: the others are not asked again."""
    settings = TrainSettings(nodes=3, node_rank=0, master_addr="10.0.0.1", num_processes=8, master_port=1234)
    commands = using_commands("training.compare", tmp_path, settings, MACHINE, ("--more",))
    assert [command.name for command in commands] == [f"compare-{rank}" for rank in range(8)]
    last = commands[-1]
    assert last.argv == [sys.executable, "-m", "training.compare", "--config", f"{tmp_path}/config.yaml", "--more"]
    wanted = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4321"}
    assert last.env | wanted == last.env and last.log == f"{tmp_path}/logs/compare-7.log"


def test_torchrun_command(tmp_path):
    settings = TrainSettings(nodes=3, node_rank=2, master_addr="10.0.0.1", num_processes=8)
    (command,) = rank_commands(tmp_path, settings, MACHINE, resume=False)
    assert " ".join(command.argv[1:]) == (
        "-m training.launch.agent --nnodes 3 --node-rank 2 --nproc-per-node 8 --max-restarts 0 "
        f"--master-addr 10.0.0.1 --master-port 29500 -m training.worker --config {tmp_path}/config.yaml"
    )
    assert command.name == "node-2"


@pytest.mark.parametrize("asked", [True, False])
def test_the_compiler_is_on_where_it_is_asked_for(tmp_path, asked):
    settings = TrainSettings(compile=asked, num_processes=2)
    for one in (settings, settings.model_copy(update={"nodes": 2}), settings.model_copy(update={"hostfile": "hosts"})):
        commands = rank_commands(tmp_path, one, MACHINE, resume=False)
        assert {"TORCHDYNAMO_DISABLE" in command.env for command in commands} == {not asked}


@pytest.mark.parametrize(("sharded", "gpus", "given_back"), [(True, 0, True), (True, 8, False), (False, 0, False)])
def test_ranks_on_a_cpu_that_share_out_weights_give_freed_memory_back(tmp_path, sharded, gpus, given_back):
    machine = Machine(num_gpus=gpus, num_cores=8, free_port=4321)
    for settings in (TrainSettings(zero_stage=3), TrainSettings(strategy="fsdp")) if sharded else (TrainSettings(),):
        commands = rank_commands(tmp_path, settings, machine, resume=False)
        assert {"MALLOC_MMAP_THRESHOLD_" in command.env for command in commands} == {given_back}


def test_hostfile_command(tmp_path):
    settings = TrainSettings(hostfile="/etc/hosts.ds", master_addr="10.0.0.1", num_processes=4, master_port=1234)
    (command,) = rank_commands(tmp_path, settings, MACHINE, resume=True)
    assert " ".join(command.argv[1:]) == (
        "-m deepspeed.launcher.runner --launcher pdsh --hostfile /etc/hosts.ds --no_local_rank --master_port 1234 "
        f"--master_addr 10.0.0.1 --num_gpus 4 --module training.worker --config {tmp_path}/config.yaml --resume"
    )


NODE = """
import json, sys
from pathlib import Path
from tests.support.listeners import listeners
from training.launch.launcher import Listener, launch_worker
from training.settings import TrainSettings
run_dir, node_rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
settings = TrainSettings(nodes=2, node_rank=node_rank, master_port=port, num_processes=2, stop_deadline_seconds=2)
events = []
def note(event):
    events.append(event | {"listeners": listeners()})
report = launch_worker("tests.support.ranks", run_dir, settings, Listener(note, lambda line: None), False)
print(json.dumps({"report": report.as_dict(), "events": events}))
"""


def run_two_nodes(tmp_path: Path, config: dict) -> list[dict]:
    """Two machines on loopback, each with its own launcher, supervisor, torchrun agent and two ranks."""
    port = free_port()
    nodes = []
    for node_rank in range(2):
        directory = tmp_path / f"node-{node_rank}"
        directory.mkdir()
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-c", NODE, str(directory), str(node_rank), str(port)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        nodes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    return [json.loads(node.communicate(timeout=120)[0]) for node in nodes]


@pytest.mark.distributed
def test_two_nodes_on_loopback(tmp_path):
    answers = run_two_nodes(tmp_path, {"behaviour": dict.fromkeys(range(4), "add_up_ranks")})
    assert [answer["report"]["reason"] for answer in answers] == ["completed", "completed"]
    sums = [event for answer in answers for event in answer["events"] if event["event"] == "sum"]
    assert {event["sum"] for event in sums} == {1 + 2 + 3 + 4}
    assert sorted((event["rank"], event["local_rank"]) for event in sums) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert {event["rank"] for event in answers[1]["events"] if "rank" in event} == {2, 3}
    found = {address for answer in answers for event in answer["events"] for address in event["listeners"]}
    assert found == {"127.0.0.1"}, "the agent of machine 0 listens at master_addr alone"


@pytest.mark.distributed
def test_a_rank_that_dies_on_one_node_ends_both(tmp_path):
    config = {"behaviour": dict.fromkeys(range(4), "add_up_ranks"), "then": {3: "crash"}}
    first, second = (answer["report"] for answer in run_two_nodes(tmp_path, config))
    assert second["source"] == "rank-3" and second["message"] == "the true cause"
    assert 'raise RuntimeError("the true cause")' in second["details"]
    assert first["reason"] == "lost_rank" and max(first["seconds"], second["seconds"]) < 60


def test_reasons_are_a_closed_set_with_distinct_codes():
    assert len({reason.code for reason in ExitReason}) == len(ExitReason)
    assert all(reason_of_code(reason.code) is reason for reason in ExitReason)
    assert reason_of_code(1) is ExitReason.infrastructure and reason_of_code(-9) is ExitReason.lost_rank
    assert reason_of_error(OSError(28, os.strerror(28))) is ExitReason.infrastructure
    assert {reason.mlflow_status for reason in ExitReason} == {"FINISHED", "KILLED", "FAILED"}
