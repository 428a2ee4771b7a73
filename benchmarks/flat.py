"""Retraining again and again with `panda gc` in between: disk, databases, memory and handles, flat after the first.

In: `--runs 40`. Out: a line after each tenth run, and what each number grew by a run since the tenth. Every run gets a
corpus of which a third is new: the flow with its Prefect run prepares the data, and what a training leaves (run
directory, checkpoint, MLflow run, logged models, version) is written beside it without training, so that many runs
fit. The server's own memory of events, a week, is set to a minute for this. Cost: three seconds of CPU a run.

    python -m benchmarks.flat --runs 40
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import psutil

KEEP_VERSIONS = 3
EVENTS_FOR_A_MINUTE = {
    "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "PT1M",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "10",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": "{}",
}
FILES, RECORDS = 3, 200
MEGABYTE = 1e6


def main() -> None:
    """Run, free, look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="panda-flat-") as folder:
        os.chdir(folder)
        os.environ |= {"PREFECT_HOME": f"{folder}/prefect", "PREFECT_PROFILES_PATH": f"{folder}/prefect/profiles.toml"}
        os.environ |= {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_LOGGING_LEVEL": "WARNING"}
        os.environ |= EVENTS_FOR_A_MINUTE
        from flows.stack.prefect_server import connected

        with connected() as wait_until_up:
            wait_until_up()
            from flows.stack import prefect_home

            prefect_home.remember(os.environ[prefect_home.URL])
            _play(Path(folder), arguments.runs, arguments.every)


def _play(folder: Path, runs: int, every: int) -> None:
    seen: list[dict[str, float]] = []
    for number in range(1, runs + 1):
        _corpus(folder / "corpus", number)
        _run(folder, number)
        _gc(folder)
        if number % every == 0:
            seen.append(_look(folder))
            if len(seen) == 1:
                print(f"{'runs':>5}" + "".join(f"{name:>16}" for name in seen[0]))
            print(f"{number:>5}" + "".join(f"{value:>16,.2f}" for value in seen[-1].values()), flush=True)
    if len(seen) > 1:
        growth = {name: (seen[-1][name] - seen[0][name]) / (runs // every * every - every) for name in seen[0]}
        print("a run" + "".join(f"{value:>16,.4f}" for value in growth.values()))


def _corpus(data: Path, number: int) -> None:
    """The newest three files."""
    data.mkdir(exist_ok=True)
    records = [{"input": f"question {number} {i}", "target": f"answer {i}"} for i in range(RECORDS)]
    (data / f"{number:04}.json").write_text(json.dumps(records))
    (data / f"{number - FILES:04}.json").unlink(missing_ok=True)


def _run(folder: Path, number: int) -> None:
    """The data stages as a run of the flow, then what a training would leave."""
    from flows.panda_train import panda_train
    from tests.support.registered import add_made_version

    settings: dict[str, Any] = {"model": "panda-tiny", "instruction_tuning_data_dir": str(folder / "corpus")}
    settings |= {"overrides": ["pretraining_data_dir=null"], "max_seq_length": 64, "prepare_workers": 0}
    state = panda_train(**settings, until_stage="plan", return_state=True)
    assert state.is_completed(), state
    plans = (folder / "cache" / "plans").iterdir()
    newest = max((path for path in plans if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime)
    of_a_byte = 1 + number % 200
    version = add_made_version(folder / "outputs", folder / "cache", of_a_byte, plan=newest, name=f"run-{number:05}")
    from training.registry.promotion import make_champion
    from training.registry.versions import Registry

    make_champion(Registry(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}"), version)


def _gc(folder: Path) -> None:
    import contextlib
    import io

    from flows.cli.main import main as panda
    from flows.stack.prefect_home import URL

    os.environ.pop(URL, None)  # so that the server is this project's, whose runs may go
    with contextlib.redirect_stdout(io.StringIO()):
        assert panda(["gc", "--keep_versions", str(KEEP_VERSIONS), "--keep_days", "0", "--yes", "--json"]) == 0
    logging.getLogger().handlers.clear()  # each call of the command line adds one


def _look(folder: Path) -> dict[str, float]:
    """Megabytes and counts."""
    me = psutil.Process()
    server = next(child for child in me.children() if "prefect_server" in " ".join(child.cmdline()))
    from flows.retention.on_disk import size_of

    return {
        "cache MB": size_of(folder / "cache") / MEGABYTE,
        "outputs MB": size_of(folder / "outputs") / MEGABYTE,
        "mlflow.db MB": (folder / "outputs" / "mlflow.db").stat().st_size / MEGABYTE,
        "prefect.db MB": (folder / "prefect" / "prefect.db").stat().st_size / MEGABYTE,
        "memory MB": me.memory_info().rss / MEGABYTE,
        "server MB": server.memory_info().rss / MEGABYTE,
        "handles": me.num_fds(),
        "server handles": server.num_fds(),
    }


if __name__ == "__main__":
    main()
