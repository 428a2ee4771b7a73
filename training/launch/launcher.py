"""Run the ranks of a training run and say how it ended.

In: a run directory with `config.yaml`, the settings, two callbacks. Out: an `ExitReport`; logs in RUN/logs/*.log;
`PANDA {json}` lines of the ranks as events, the other lines (rate-limited) as log text. The processes belong to
`training.launch.supervisor`: whatever ends this function or this process also ends the ranks.

Out of memory: the micro-batch is halved, the accumulation doubled (the rows of every step stay the same) and the run
goes on from its last checkpoint. Stalled: stacks of all ranks are logged, the run ends. Cost: five looks at the logs a
second.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from training import run_files
from training.cost.marks import DOWN, LOAD, holding, turn_to
from training.launch import ownership
from training.launch.commands import (
    WORKER,
    Command,
    num_oom_kills,
    num_ranks,
    python_path,
    rank_commands,
    this_machine,
    using_commands,
)
from training.launch.events import Event, Exit, Exited, MicroBatch, Started, event_of
from training.launch.exits import OWNED, ExitReason, reason_of_code
from training.launch.logs import LogTail, RateLimit, Watchdog, traceback_of
from training.launch.processes import kill_all, marked
from training.settings import TrainSettings

POLL_SECONDS = 0.2
STACKS_SECONDS = 2.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExitReport:
    """How a run ended. `message` is one line for people, `details` the traceback or stacks that explain it."""

    reason: ExitReason
    message: str = ""
    details: str = ""
    source: str = ""  # the rank (or machine) that ended the run
    seconds: float = 0.0
    micro_batch_halvings: int = 0

    @property
    def retry_helps(self) -> bool:
        """True where starting again with resume=True may succeed."""
        return self.reason.retry_helps

    def as_dict(self) -> dict:
        """JSON form, for summaries."""
        return asdict(self) | {"exit_code": self.reason.code, "retry_helps": self.retry_helps}


@dataclass(frozen=True)
class Listener:
    """Who is told what the ranks say. An exception raised in a callback cancels the run."""

    on_event: Callable[[Event], None]
    on_log: Callable[[str], None]


def launch(
    run_dir: Path,
    settings: TrainSettings,
    on_event: Callable[[Event], None],
    on_log: Callable[[str], None],
    resume: bool = False,
) -> ExitReport:
    """Train `run_dir`; returns when no process of it is left. To cancel: raise in a callback, or a signal handler."""
    return launch_worker(WORKER, run_dir, settings, Listener(on_event, on_log), resume)


def launch_worker(worker: str, run_dir: Path, settings: TrainSettings, listener: Listener, resume: bool) -> ExitReport:
    """Run ranks of the module `worker`, again with a smaller micro-batch as often as memory asks for it."""
    started = time.monotonic()
    halvings = 0
    while True:
        machine = this_machine()
        commands = rank_commands(run_dir, settings, machine, resume, worker)
        turn_to(run_dir, LOAD)
        with holding(run_dir, num_ranks(settings, machine)):
            report = run_commands(commands, settings, listener)
        if report.reason is not ExitReason.completed:
            turn_to(run_dir, DOWN)
        smaller = report.reason is ExitReason.out_of_memory and shrink_micro_batch(run_dir, settings)
        if not smaller:
            seconds = time.monotonic() - started
            return ExitReport(**{**vars(report), "seconds": seconds, "micro_batch_halvings": halvings})
        halvings += 1
        resume = True
        listener.on_event({"event": "out_of_memory", "source": report.source, **smaller})
        listener.on_log(f"{report.source} is out of memory ({report.message}); going on with {smaller}")


def use(
    module: str, run_dir: Path, settings: TrainSettings, on_log: Callable[[str], None], *arguments: str
) -> ExitReport:
    """Use RUN/model in as many processes as the ranks, and owned like them; `module` writes what it finds."""
    commands = using_commands(module, run_dir, settings, this_machine(), arguments)
    with holding(run_dir, len(commands)):
        return run_commands(commands, settings, Listener(lambda event: None, on_log))


def smaller_micro_batch(micro_batch: int, accumulation: int) -> tuple[int, int] | None:
    """(micro-batch, accumulation) with the same product and at most half the micro-batch; None at micro-batch 1."""
    rows = micro_batch * accumulation
    smaller = next((size for size in range(micro_batch // 2, 0, -1) if rows % size == 0), None)
    return None if smaller is None else (smaller, rows // smaller)


def shrink_micro_batch(run_dir: Path, settings: TrainSettings) -> MicroBatch | None:
    """Write the next smaller micro-batch into RUN/config.yaml; None where that is switched off or not possible.

    With several machines each has its own launcher, and one alone cannot restart the others: they get the report.
    """
    if not settings.halve_batch_on_out_of_memory or settings.nodes > 1:
        return None
    path = run_dir / run_files.CONFIG
    config = yaml.safe_load(path.read_text())
    smaller = smaller_micro_batch(config["per_gpu_train_batch_size"], config["gradient_accumulation_steps"])
    if smaller is None:
        return None
    changed: MicroBatch = {"per_gpu_train_batch_size": smaller[0], "gradient_accumulation_steps": smaller[1]}
    run_files.write_atomically(path, yaml.safe_dump(config | changed, allow_unicode=True, sort_keys=False))
    return changed


@dataclass
class Attempt:
    """What is known of one start of the ranks while it runs."""

    commands: list[Command]
    tails: dict[str, LogTail]
    exits: list[Exited] = field(default_factory=list)
    last_words: list[tuple[str, Exit]] = field(default_factory=list)  # (command, what one of its ranks printed)
    stall: str = ""  # set when the run was ended for making no progress
    stall_offsets: dict[str, int] = field(default_factory=dict)  # where the stacks begin in each log


def run_commands(commands: list[Command], settings: TrainSettings, listener: Listener) -> ExitReport:
    """Start the commands once, follow them to the end, judge the end."""
    attempt = Attempt(commands, {command.name: LogTail(Path(command.log)) for command in commands})
    watchdog = Watchdog(settings.stall_seconds)
    rate_limit = RateLimit(listener.on_log)
    limited = Listener(listener.on_event, rate_limit)
    kills_before = num_oom_kills()
    try:
        with supervised(commands, settings.stop_deadline_seconds) as supervisor:
            while read_facts(attempt, supervisor):
                relay(attempt, watchdog, limited)
                if not attempt.stall and (silence := watchdog.overdue()):
                    end_stalled(attempt, supervisor, silence, watchdog.allowance)
                time.sleep(POLL_SECONDS)
    except BaseException:
        tell_last_words(attempt, listener.on_log)
        raise
    while relay(attempt, watchdog, limited):
        pass
    rate_limit.account()
    return judge(attempt, num_oom_kills() - kills_before)


@contextlib.contextmanager
def supervised(commands: list[Command], grace_seconds: float) -> Iterator[subprocess.Popen]:
    """A running supervisor of the commands; on leaving, for whatever reason, it is made to end all of them."""
    token = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "training.launch.supervisor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # what a dead supervisor did not take must not be tried again by close()
        env={**os.environ, "PYTHONPATH": python_path(), OWNED: token},
        start_new_session=True,
        pass_fds=ownership.held(),
    )
    assert process.stdin and process.stdout, "both are pipes"
    try:
        spec = {"commands": [command.as_dict() for command in commands], "grace_seconds": grace_seconds}
        say(process, json.dumps(spec))
        os.set_blocking(process.stdout.fileno(), False)
        yield process
    except KeyboardInterrupt:
        log.warning("the ranks have %g s to write a checkpoint; Ctrl-C again ends them at once", grace_seconds)
        raise
    finally:
        process.stdin.close()
        try:
            process.wait()
        finally:  # a supervisor that was itself killed leaves ranks behind, and so does a second Ctrl-C
            process.stdout.close()
            kill_all(lambda: marked(OWNED, token))


def say(supervisor: subprocess.Popen, line: str) -> None:
    """One line to the supervisor; if it is gone, the loop that reads from it will notice."""
    assert supervisor.stdin, "a pipe"
    with contextlib.suppress(BrokenPipeError):
        os.write(supervisor.stdin.fileno(), f"{line}\n".encode())


def read_facts(attempt: Attempt, supervisor: subprocess.Popen) -> bool:
    """Take in what the supervisor has said; False when it has ended. Its lines are far shorter than a pipe's atom."""
    assert supervisor.stdout, "a pipe"
    try:
        data = os.read(supervisor.stdout.fileno(), 1 << 16)
    except BlockingIOError:
        return True
    facts: list[Started | Exited] = [json.loads(line) for line in data.splitlines()]
    attempt.exits += [fact for fact in facts if fact["event"] == "exited"]
    return bool(data)


def relay(attempt: Attempt, watchdog: Watchdog, listener: Listener) -> int:
    """Pass on what the logs say that is new; returns the number of bytes."""
    before = sum(tail.offset for tail in attempt.tails.values())
    for name, tail in attempt.tails.items():
        for line in tail.new_lines():
            event = event_of(line)
            if event is None:
                listener.on_log(f"[{name}] {line}")
                continue
            watchdog.progress(event)
            if event["event"] == "exit":
                attempt.last_words.append((name, event))
            else:
                listener.on_event(event)
    return sum(tail.offset for tail in attempt.tails.values()) - before


def tell_last_words(attempt: Attempt, on_log: Callable[[str], None]) -> None:
    """What the ranks of a cancelled run have said since: whether there was time for a checkpoint."""
    for name, tail in attempt.tails.items():
        for event in map(event_of, tail.new_lines()):
            if event and event["event"] == "exit":
                on_log(f"[{name}] {event['message']}")


def end_stalled(attempt: Attempt, supervisor: subprocess.Popen, silence: float, allowance: float) -> None:
    """Have every rank write its stacks to its log, then kill them: ranks stuck in a collective obey no SIGTERM."""
    attempt.stall = f"no sign of progress for {silence:.0f} s (allowed: {allowance:.0f} s); stacks are in the logs"
    attempt.stall_offsets = {name: tail.offset for name, tail in attempt.tails.items()}
    say(supervisor, "stacks")
    time.sleep(STACKS_SECONDS)
    say(supervisor, "kill")


def judge(attempt: Attempt, num_kills_for_memory: int) -> ExitReport:
    """The report of an attempt that has ended."""
    if attempt.stall:
        stacks = [f"[{name}]\n{tail.text(attempt.stall_offsets[name])}" for name, tail in attempt.tails.items()]
        return ExitReport(ExitReason.lost_rank, attempt.stall, "\n".join(stacks))
    if len(attempt.exits) < len(attempt.commands):
        return ExitReport(ExitReason.lost_rank, "the supervisor of the ranks was killed")
    failed = [fact for fact in attempt.exits if fact["code"] and not fact["ended_by_us"]]
    if not failed:
        cut_short = any(fact["code"] for fact in attempt.exits)
        return ExitReport(ExitReason.cancelled if cut_short else ExitReason.completed)
    reports = [_report_of(attempt, fact, num_kills_for_memory) for fact in failed]
    # A lost rank is mostly the echo of another one's failure, seen in the same instant; then that one is the cause.
    return min(reports, key=lambda report: report.reason is ExitReason.lost_rank)


def _report_of(attempt: Attempt, fact: Exited, num_kills_for_memory: int) -> ExitReport:
    """How one command ended: by its last words, else by its exit code."""
    name, code = fact["name"], fact["code"]
    words = [event for source, event in attempt.last_words if source == name]
    if words:
        cause = min(words, key=lambda event: (event["reason"] == ExitReason.lost_rank, event["time"]))
        return ExitReport(ExitReason(cause["reason"]), cause["message"], cause["details"], f"rank-{cause['rank']}")
    details = traceback_of(attempt.tails[name].text())
    if code == -signal.SIGKILL and num_kills_for_memory:
        return ExitReport(ExitReason.out_of_memory, f"{name} was killed by the kernel for memory", details, name)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return ExitReport(reason_of_code(code), f"{name} {how}", details, name)
