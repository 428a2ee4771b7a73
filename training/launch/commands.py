"""Command lines and environments that start the ranks: pure functions, nothing is started here.

In: the engine settings and the run directory. Out: a list of `Command` (name, argv, environment, log file).
Three ways, chosen by the settings:

- one machine: each rank is started directly with the rendezvous variables (2 to 6 s sooner than through a launcher);
- `nodes > 1`: this machine's torchrun agent; every machine runs the same with its own `node_rank`;
- `hostfile`: one `deepspeed` command on this machine that reaches the others through pdsh.

What uses the trained weights (evaluation, loading back, comparison) runs on the ranks of this machine alone, started
directly: weights without gradients and optimizer states need no second machine.

Facts about this machine that the launcher needs, found without torch. In: /proc, /dev, cgroups. Out: numbers.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from training import run_files
from training.launch.processes import LOOPBACK, free_port
from training.settings import EngineSettings

PROJECT = Path(__file__).resolve().parents[2]
WORKER = "training.worker"
EVALUATE = "training.evaluate"
COMPARE = "training.compare"
LOAD_BACK = "training.registry.loaded_back"
DEFAULT_PORT = 29500
GIVEN_BACK_BYTES = 4 << 20  # tensors from this size on are given back to the system when they are freed


@dataclass(frozen=True)
class Command:
    """One process for the supervisor; `env` is added to its environment, `log` gets its output."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: str

    def as_dict(self) -> dict:
        """JSON form for the supervisor."""
        return asdict(self)


@dataclass(frozen=True)
class Machine:
    """What the builders need to know of this machine; filled by `this_machine`, by hand in tests."""

    num_gpus: int
    num_cores: int
    free_port: int


def rank_commands(
    run_dir: Path, settings: EngineSettings, machine: Machine, resume: bool, worker: str = WORKER
) -> list[Command]:
    """The commands that train `run_dir` on this machine; `worker` is the module every rank runs."""
    if settings.hostfile:
        return [hostfile_command(run_dir, settings, machine, resume, worker)]
    if settings.nodes > 1:
        return [torchrun_command(run_dir, settings, machine, resume, worker)]
    return direct_commands(run_dir, settings, machine, resume, worker)


def num_local_ranks(settings: EngineSettings, machine: Machine) -> int:
    """Ranks on this machine: as asked, else one per GPU, else two."""
    return settings.num_processes or machine.num_gpus or 2


def num_ranks(settings: EngineSettings, machine: Machine) -> int:
    """Ranks of all machines together; 0 where only the hostfile tells."""
    return 0 if settings.hostfile else settings.nodes * num_local_ranks(settings, machine)


def direct_commands(
    run_dir: Path, settings: EngineSettings, machine: Machine, resume: bool, worker: str
) -> list[Command]:
    """One command per rank, all on this machine, meeting at a local port."""
    return local_ranks("rank", [worker, *worker_args(run_dir, resume)], run_dir, settings, machine)


def local_ranks(
    kind: str, module: list[str], run_dir: Path, settings: EngineSettings, machine: Machine
) -> list[Command]:
    """The ranks of this machine, each running `module` (with its arguments), called `kind` and their number."""
    size = num_local_ranks(settings, machine)
    common = common_env(settings, machine, size) | {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": settings.master_addr,
        "MASTER_PORT": str(settings.master_port or machine.free_port),
    }
    return [
        Command(
            name=f"{kind}-{rank}",
            argv=[sys.executable, "-m", *module],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            log=str(run_dir / run_files.LOGS / f"{kind}-{rank}.log"),
        )
        for rank in range(size)
    ]


def torchrun_command(run_dir: Path, settings: EngineSettings, machine: Machine, resume: bool, worker: str) -> Command:
    """This machine's torchrun agent; static rendezvous keeps rank 0 on machine 0. Restarts are ours, with resume.

    It listens at `master_addr` alone (`training/launch/agent.py`).
    """
    size = num_local_ranks(settings, machine)
    argv = [
        *[sys.executable, "-m", "training.launch.agent"],
        *["--nnodes", str(settings.nodes), "--node-rank", str(settings.node_rank)],
        *["--nproc-per-node", str(size), "--max-restarts", "0"],
        *["--master-addr", settings.master_addr, "--master-port", str(settings.master_port or DEFAULT_PORT)],
        *["-m", worker, *worker_args(run_dir, resume)],
    ]
    name = f"node-{settings.node_rank}"
    return Command(name, argv, common_env(settings, machine, size), str(run_dir / run_files.LOGS / f"{name}.log"))


def hostfile_command(run_dir: Path, settings: EngineSettings, machine: Machine, resume: bool, worker: str) -> Command:
    """The DeepSpeed launcher: starts the ranks of every host in the hostfile through pdsh (passwordless ssh)."""
    argv = [
        *[sys.executable, "-m", "deepspeed.launcher.runner", "--launcher", "pdsh"],
        *["--hostfile", str(settings.hostfile), "--no_local_rank"],
        *["--master_port", str(settings.master_port or DEFAULT_PORT)],
    ]
    if settings.master_addr != LOOPBACK[0]:  # otherwise the first host of the file
        argv += ["--master_addr", settings.master_addr]
    if settings.num_processes:
        argv += ["--num_gpus", str(settings.num_processes)]
    argv += ["--module", worker, *worker_args(run_dir, resume)]
    return Command(
        "hosts", argv, common_env(settings, machine, machine.num_gpus or 1), str(run_dir / run_files.LOGS / "hosts.log")
    )


def using_commands(
    module: str, run_dir: Path, settings: EngineSettings, machine: Machine, arguments: tuple[str, ...] = ()
) -> list[Command]:
    """The ranks that use what lies in RUN: as many as have trained on this machine, called after the module."""
    here = settings.model_copy(update={"nodes": 1, "hostfile": None, "master_addr": LOOPBACK[0], "master_port": 0})
    words = [module, *worker_args(run_dir, resume=False), *arguments]
    return local_ranks(module.rpartition(".")[2], words, run_dir, here, machine)


def worker_args(run_dir: Path, resume: bool) -> list[str]:
    """Arguments of the worker, absolute: the launcher's working directory need not be the ranks'."""
    return ["--config", str(run_dir.resolve() / run_files.CONFIG), *(["--resume"] if resume else [])]


def common_env(settings: EngineSettings, machine: Machine, num_local: int) -> dict[str, str]:
    """Variables every rank gets; the cores are shared out, and what only costs start-up time is switched off."""
    env = {
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # bars of libraries, one line each in a log
        "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed calls what torch has deprecated
    }
    if not settings.compile:  # importing deepspeed pulls in torch._inductor (1.4 s) unless compilation is off
        env |= {"TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
    if not machine.num_gpus and (settings.strategy == "fsdp" or settings.zero_stage == 3):
        # gathered weights come and go in the CPU's memory; glibc would keep what each thread has freed
        env["MALLOC_MMAP_THRESHOLD_"] = str(GIVEN_BACK_BYTES)
    if "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, machine.num_cores // num_local))
    return env


def python_path() -> str:
    """PYTHONPATH under which `training` is found from any working directory."""
    return os.pathsep.join(part for part in (str(PROJECT), os.environ.get("PYTHONPATH")) if part)


MEMORY_EVENTS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


def this_machine() -> Machine:
    """GPUs, usable cores and a port that is free now; where somebody else then takes it, the run is retried."""
    return Machine(num_gpus=num_gpus(), num_cores=len(os.sched_getaffinity(0)), free_port=free_port())


def num_gpus() -> int:
    """GPUs the ranks will see: CUDA_VISIBLE_DEVICES if set, else the NVIDIA device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def num_oom_kills() -> int:
    """How often the kernel has killed a process of this control group for memory; 0 where that is not counted."""
    for path in MEMORY_EVENTS:
        if path.exists():
            words = path.read_text().split()
            return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0
    return 0


def machine_kind() -> str:
    """Processor, cores and GPUs: where they are the same, so are the losses, bit by bit."""
    cpu = _values(Path("/proc/cpuinfo"), "model name")[:1] or ["unknown processor"]
    models = [model for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
              for model in _values(path, "Model")]  # fmt: skip
    return ", ".join([f"{cpu[0]} ({len(os.sched_getaffinity(0))} cores)", *models])


def _values(path: Path, name: str) -> list[str]:
    """Values of the lines `name : value` of a file in /proc."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]
