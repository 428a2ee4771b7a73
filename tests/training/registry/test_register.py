"""The registry on real databases and a real server: one version per model, no copies, no pickles, and it answers."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file, save_file

from tests.support.mlflow_fixtures import guarded, load_and_generate, server
from tests.support.own_code import save_own_model
from tests.support.tiny_models import save_adapter, save_full_model
from training.errors import MlflowAway, ModelError
from training.launch.exits import ExitReason, reason_of_error
from training.launch.processes import free_port
from training.registry import loaded_back, proof
from training.registry import register as registry
from training.registry.loaded_back import load_served
from training.registry.register import register, register_run
from training.run_files import DATA_REPORT
from training.settings import TrackingSettings
from training.tracking import plots
from training.tracking.run import RunMetadata, TrackedRun, open_run
from training.tracking.run_record import Dataset
from training.tracking.sync import connect

pytestmark = pytest.mark.usefixtures("load_back_here")
TAGS = {"panda.corpus": "c" * 32, "panda.plan": "p" * 32}


def tracked_run(run_dir: Path, uri: str | None = None) -> TrackedRun:
    """A finished MLflow run for this directory, as if three steps had been trained."""
    trained(run_dir, steps=3)
    with open_run(TrackingSettings(mlflow_tracking_uri=uri), run_dir, RunMetadata({"model": "tiny"})) as tracked:
        tracked.wait_for_run_id()
    return tracked


def trained(run_dir: Path, steps: int, **settings) -> None:
    """What the worker writes when it is done, and RUN/config.yaml as far as registration reads it."""
    (run_dir / "train.json").write_text(json.dumps({"steps": steps, "best_step": None}))
    if not (run_dir / "config.yaml").exists():
        paths = {"plan_dir": "/gone", "tokenizer_dir": str(run_dir / "model"), "run_dir": str(run_dir)}
        (run_dir / "config.yaml").write_text(json.dumps({"paths": paths, "cache_dir": "/gone", **settings}))


def versions(uri: str, name: str) -> list:
    return connect(uri).search_model_versions(f"name = '{name}'")


def greedy(model, tokenizer_dir: Path, prompt: str, num_tokens: int) -> str:
    """What transformers itself generates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.eval().generate(input_ids=ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_full_weights_are_linked_not_copied_and_generate(run_dir):
    model = save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    assert version.uri == "models:/panda-tiny/1"
    assert load_and_generate(version.uri, "hello", 12, tracked.uri) == greedy(model, run_dir / "model", "hello", 12)
    (stored,) = (run_dir.parent / "mlartifacts").rglob("model.safetensors")
    assert stored.samefile(run_dir / "model" / "model.safetensors")
    files = [path.name for path in stored.parents[2].rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt", ".pickle"))]
    assert {"MLmodel", "served_model.py", "requirements.txt", "input_example.json"} <= set(files)
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".package")] == []


def test_registering_again_gives_the_same_version_until_the_run_goes_on(run_dir):
    run_dir = run_dir.rename(run_dir.with_name("week-48-llama-3.1-8b"))  # MLflow takes no dot in some names
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    first = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    written_anew(run_dir)
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri) == first
    (stored,) = versions(tracked.uri, "panda-tiny")
    assert stored.tags["panda.corpus"] == "c" * 32 and stored.run_id == tracked.run_id
    assert stored.tags["panda.step"] == "3"
    other_weights(run_dir)
    with pytest.raises(ModelError, match=r"models:/panda-tiny/1, registered by this run at step 3: .* is not as in"):
        register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    trained(run_dir, steps=4)
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri).version == 2


def written_anew(run_dir: Path) -> None:
    """The same weights in other bytes, as another version of the code would write them."""
    shutil.copytree(run_dir / "model", run_dir / "model2")
    weights = run_dir / "model2" / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "written_by": "newer code"})
    (run_dir / "model2" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    replace_model(run_dir)


def other_weights(run_dir: Path) -> None:
    save_full_model(run_dir / "model2", seed=5)
    replace_model(run_dir)


def replace_model(run_dir: Path) -> None:
    """RUN/model2 becomes RUN/model, as the worker does it."""
    shutil.rmtree(run_dir / "model")
    (run_dir / "model2").rename(run_dir / "model")


def older_key(run_id: str, model_dir: Path) -> str:
    """`panda.key` as the code before `panda.step` made it, of the run and of all bytes of its model."""
    content = hashlib.sha256()
    for path in sorted(path for path in model_dir.rglob("*") if path.is_file()):
        hashed = hashlib.sha256(path.read_bytes()).hexdigest()
        content.update(f"{path.relative_to(model_dir)}\0{hashed}\0".encode())
    return hashlib.sha256(f"{run_id}\0{content.hexdigest()}".encode()).hexdigest()[:32]


def registered_by_older_code(run_dir: Path, tracked: TrackedRun, name: str | None = "panda-tiny") -> str:
    """The logged model and the version as the code before `panda.step` left them: its key, its calls, its tags.

    Without a name: killed after the logged model and before the version. Returns the id of the logged model.
    """
    client, model_dir = connect(tracked.uri), run_dir / "model"
    key = older_key(tracked.run_id, model_dir)
    tags = {**TAGS, "panda.key": key}
    logged = registry.log_model(client, model_dir, tracked.run_id, tags)
    if name:
        registry.ensure_registered_model(client, name)
        source = f"models:/{logged.model_id}"
        client.create_model_version(name, source=source, run_id=tracked.run_id, tags=tags, model_id=logged.model_id)
    return logged.model_id


@pytest.mark.parametrize("name", ["panda-tiny", None], ids=["version", "killed before the version"])
def test_what_older_code_registered_is_found_by_its_weights(name, run_dir):
    """The key was a hash of bytes, and newer code writes the same weights in other bytes."""
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    logged = registered_by_older_code(run_dir, tracked, name)
    written_anew(run_dir)
    for _ in range(2):  # the second time by the new key
        assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri).uri == "models:/panda-tiny/1"
    (stored,) = versions(tracked.uri, "panda-tiny")
    assert stored.source == f"models:/{logged}" and stored.tags["panda.step"] == "3"
    assert [one.model_id for one in logged_models(tracked)] == [logged]


def test_a_run_that_older_code_registered_and_that_went_on_gets_a_second_version(run_dir):
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    registered_by_older_code(run_dir, tracked)
    other_weights(run_dir)
    trained(run_dir, steps=4)
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri).version == 2
    assert "panda.step" not in connect(tracked.uri).get_model_version("panda-tiny", "1").tags


def test_what_older_code_left_half_done_is_deleted(run_dir, monkeypatch):
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "write_package", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registered_by_older_code(run_dir, tracked)
    written_anew(run_dir)
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri).version == 1
    assert [str(one.status) for one in logged_models(tracked)] == ["READY"]


def logged_models(tracked: TrackedRun) -> list:
    client = connect(tracked.uri)
    return client.search_logged_models([client.get_run(tracked.run_id).info.experiment_id])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_model_that_comes_back_with_other_weights_is_not_registered(kind, run_dir, tmp_path, monkeypatch):
    """The files that MLflow keeps are not those of RUN/model: nothing is left of it, and trying again succeeds."""
    save_full_model(run_dir / "model" if kind == "full" else tmp_path / "base")
    if kind == "adapter":
        save_adapter(tmp_path / "base", run_dir / "model")
    tracked, original = tracked_run(run_dir), registry.link_tree

    def changed_on_the_way(source: Path, target: Path) -> None:
        original(source, target)
        (weights,) = target.rglob("*.safetensors")
        tensors = load_file(weights)
        tensors[max(tensors)] += 1e-3
        weights.unlink()  # a link: RUN/model keeps its bytes
        save_file(tensors, weights, metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(registry, "link_tree", changed_on_the_way)
        with pytest.raises(
            ModelError, match=r"is not registered: loaded back from MLflow it is another model: .* not as"
        ):
            register_run(tracked, "panda-tiny", TAGS, "hello")
    assert not versions(tracked.uri, "panda-tiny") and not logged_models(tracked)
    assert not list((run_dir.parent / "mlartifacts").rglob("*.safetensors"))
    version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
    assert version.version == 1 and text


def test_a_model_that_cannot_be_loaded_back_is_not_registered(run_dir):
    """A tensor is missing: transformers would put random numbers in its place."""
    save_full_model(run_dir / "model")
    weights = run_dir / "model" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    tracked = tracked_run(run_dir)
    with pytest.raises(
        ModelError, match=r"cannot be loaded back .* 1 tensors .* first model.layers.1.mlp.up_proj.weight"
    ):
        register_run(tracked, "panda-tiny", TAGS, "hello")
    assert not versions(tracked.uri, "panda-tiny") and not logged_models(tracked)


def test_a_child_loads_the_model_and_this_process_does_not(run_dir, monkeypatch):
    """Also where it is wrong: what the child has found is the error here."""
    monkeypatch.undo()  # a real child
    monkeypatch.setattr(loaded_back, "load_served", lambda *_: 1 / 0)
    model = save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
    assert version.version == 1 and text == greedy(model, run_dir / "model", "hello", loaded_back.SAMPLE_TOKENS)
    (stored,) = (run_dir.parent / "mlartifacts").rglob("model.safetensors")
    tensors = {**load_file(stored), "model.norm.weight": torch.zeros(32)}
    stored.unlink()
    save_file(tensors, stored, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"registered by this run at step 3: .* model.norm.weight is not as in"):
        register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    assert "model.norm.weight" in (run_dir / "logs" / "loaded_back-0.log").read_text()
    assert not list(run_dir.glob(".load-back-*"))


@pytest.mark.distributed
def test_a_large_model_is_loaded_back_by_the_ranks_that_trained_it(run_dir, tmp_path, monkeypatch):
    monkeypatch.undo()  # real children
    monkeypatch.setattr(proof, "WHOLE_BYTES", 0)
    save_full_model(tmp_path / "base")
    model = save_adapter(tmp_path / "base", run_dir / "model")
    trained(run_dir, steps=3, num_processes=2)
    _, text = register_run(tracked_run(run_dir), "panda-tiny", TAGS, "hello")
    assert text == greedy(model, run_dir / "model", "hello", loaded_back.SHARED_TOKENS)
    assert {path.name for path in (run_dir / "logs").iterdir()} == {"loaded_back-0.log", "loaded_back-1.log"}
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="it cannot be loaded back from MLflow"):
        register_run(tracked_run(run_dir), "panda-tiny", TAGS, "hello")


def test_code_that_training_trusted_is_trusted_in_the_registry_and_no_other(run_dir, capsys):
    save_own_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    with pytest.raises(ModelError, match=r"(?s)cannot be loaded back from MLflow: .*trust_remote_code=True"):
        register_run(tracked, "panda-tiny", TAGS, "hello")
    (run_dir / "config.yaml").unlink()
    trained(run_dir, steps=3, trust_remote_code=True)
    version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
    assert text and load_and_generate(version.uri, "hello", 3, tracked.uri)
    assert "Do you wish to run" not in capsys.readouterr().out


def test_from_an_empty_prompt_a_model_begins_by_itself(run_dir):
    """This tokenizer has no bos; a model cannot be asked with no token at all."""
    model = save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    _, text = register_run(tracked, "panda-tiny", TAGS, "")
    assert text == greedy(model, run_dir / "model", "</s>", loaded_back.SAMPLE_TOKENS)
    assert load_and_generate("models:/panda-tiny/1", "", 12, tracked.uri) == greedy(
        model, run_dir / "model", "</s>", 12
    )


def test_looks_that_fail_keep_no_model_from_the_registry(run_dir, monkeypatch, caplog):
    """The sample text, the plots and the data sets of the run: each fails, each is one warning."""
    save_full_model(run_dir / "model")
    trained(run_dir, steps=3)
    monkeypatch.setattr(plots, "write_plots", lambda _: 1 / 0)
    facts = RunMetadata(
        {"model": "tiny"}, datasets=[Dataset("n" * 600, "d", "here")], reports={DATA_REPORT: {"records_in": 1}}
    )
    with open_run(TrackingSettings(), run_dir, facts) as tracked:
        monkeypatch.setattr(loaded_back, "generate", lambda *_: 1 / 0)
        version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
    assert version.version == 1 and text == ""
    run = connect(tracked.uri).get_run(tracked.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"model": "tiny"}
    assert "report" in {file.path for file in connect(tracked.uri).list_artifacts(tracked.run_id)}
    for what in ("a text of the model", "the plots of", "MLflow does not take the data sets"):
        assert caplog.text.count(what) == 1, what


def test_an_adapter_refers_to_its_base(run_dir, tmp_path, monkeypatch):
    save_full_model(tmp_path / "base")
    model = save_adapter(tmp_path / "base", run_dir / "model")
    tracked = tracked_run(run_dir)
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    expected = greedy(model, run_dir / "model", "hello", 12)
    assert load_and_generate(version.uri, "hello", 12, tracked.uri) == expected
    stored = [path for path in (run_dir.parent / "mlartifacts").rglob("*.safetensors")]
    assert [path.name for path in stored] == ["adapter_model.safetensors"]
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="PANDA_BASE_MODEL"):
        load_and_generate(version.uri, "hello", 12, tracked.uri)
    monkeypatch.setenv("PANDA_BASE_MODEL", str(tmp_path / "moved"))
    assert load_and_generate(version.uri, "hello", 12, tracked.uri) == expected


def test_chat_and_parameters(run_dir):
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    served = load_served(version.uri, tracked.uri)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answer = served.predict({"messages": messages}, params={"max_tokens": 5})
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["finish_reason"] == "length"
    texts = served.predict({"prompt": ["hello", "world"]}, params={"max_new_tokens": 8, "temperature": 2.0})
    assert len(texts) == 2


REGISTER = """
import sys
from pathlib import Path
from training.tracking.sync import connect
from training.registry.register import register
run_dir, run_id, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
connect(uri).search_registered_models()
print("ready", flush=True)
register(run_dir, run_id, "panda-tiny", {"panda.corpus": "c"}, uri)
"""


def killed_after(run_dir: Path, tracked: TrackedRun, seconds: float | None) -> tuple[bool, float]:
    """Register in a process of its own and SIGKILL it after so many seconds; (was it killed?, seconds it had)."""
    command = [sys.executable, "-c", REGISTER, str(run_dir), tracked.run_id, tracked.uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    return process.returncode == -signal.SIGKILL, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("through", ["database", "server"])
def test_killed_at_five_random_moments_every_model_is_one_version(through, output_dir):
    """Each of five registrations is killed at a random moment of the time it takes; trying again completes it."""
    port = free_port()
    with server(output_dir, port) if through == "server" else contextlib.nullcontext():
        uri = f"http://127.0.0.1:{port}" if through == "server" else f"sqlite:///{output_dir}/mlflow.db"
        runs = [tracked_run(run_with_model(output_dir, number), uri) for number in range(6)]
        killed, duration = killed_after(runs[0].run_dir, runs[0], None)
        assert not killed and len(versions(uri, "panda-tiny")) == 1
        generator = random.Random(time.time())
        moments, outcomes = [], []
        for run in runs[1:]:
            moments.append(generator.uniform(0.05, 0.95) * duration)
            was_killed, seconds = killed_after(run.run_dir, run, moments[-1])
            outcomes.append(was_killed)
            duration = duration if was_killed else seconds  # the first took longer, or the machine was busy then
        assert any(outcomes), "all registrations were over before they were to be killed"
        for run in runs:
            version = register(run.run_dir, run.run_id, "panda-tiny", TAGS, uri)
            assert register(run.run_dir, run.run_id, "panda-tiny", TAGS, uri) == version
        assert sorted(versions_of_runs(uri)) == sorted(run.run_id for run in runs), f"killed at {moments} of {duration}"
        client = connect(uri)
        experiment = client.get_experiment_by_name("panda-train").experiment_id
        logged = client.search_logged_models([experiment])
        assert [str(model.status) for model in logged] == ["READY"] * 6
        assert len(load_and_generate(version.uri, "hello", 3, uri)) > 0


def run_with_model(output_dir: Path, number: int) -> Path:
    """A run directory with a model of its own, large enough for its registration to take a moment."""
    run_dir = output_dir / f"run-{number}"
    run_dir.mkdir()
    save_full_model(run_dir / "model", seed=number)
    (run_dir / "model" / "large.bin").write_bytes(os.urandom(20_000_000))
    return run_dir


def versions_of_runs(uri: str) -> list[str]:
    """The run behind each version."""
    return [version.run_id for version in versions(uri, "panda-tiny")]


@pytest.mark.parametrize(
    "call", ["create_logged_model", "finalize_logged_model", "create_registered_model", "create_model_version"]
)
def test_a_lost_answer_makes_no_second_version(call, run_dir, monkeypatch):
    """MLflow does what it was asked for, but the answer is lost, once."""
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    original, lost = getattr(MlflowClient, call), []

    def answer_is_lost(*arguments, **named):
        result = original(*arguments, **named)
        if not lost:
            lost.append(call)
            raise MlflowException("connection reset by peer")
        return result

    monkeypatch.setattr(MlflowClient, call, answer_is_lost)
    monkeypatch.setattr(registry, "RETRY_SECONDS", (0,))
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    assert lost and version.version == 1 and len(versions(tracked.uri, "panda-tiny")) == 1
    client = connect(tracked.uri)
    logged = client.search_logged_models([client.get_experiment_by_name("panda-train").experiment_id])
    assert [str(model.status) for model in logged] == ["READY"]


@pytest.mark.slow
def test_through_a_server_and_served_by_mlflow(output_dir):
    """Upload through a server; `mlflow models serve` answers a chat request."""
    run_dir = output_dir / "run-1"
    run_dir.mkdir()
    save_full_model(run_dir / "model")
    port, serving = free_port(), free_port()
    with server(output_dir, port):
        tracked = tracked_run(run_dir, f"http://127.0.0.1:{port}")
        version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
        assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri) == version
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", version.uri, "--env-manager", "local"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `mlflow models serve` looks for uvicorn there
        env = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": tracked.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(output_dir / "serving.log", "ab") as log:
            process = subprocess.Popen(
                [*command, "--port", str(serving)], env=env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            answer = ask(process, serving, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert answer["choices"][0]["message"]["role"] == "assistant" and answer["usage"]["completion_tokens"] == 4


def test_what_a_training_has_cost_waits_longer(monkeypatch):
    monkeypatch.setattr(registry, "RETRY_SECONDS", (0,))
    monkeypatch.setattr(registry, "PATIENT_SECONDS", (0, 0))
    tries = []

    def answers_at_the_fourth_try():
        tries.append(1)
        if len(tries) % 4:
            raise MlflowException("connection refused")
        return "here"

    with pytest.raises(MlflowAway):
        registry.with_retries(answers_at_the_fourth_try)
    tries.clear()
    assert registry.with_retries(answers_at_the_fourth_try, patient=True) == "here"


def test_room_on_a_disk_is_not_waited_for_an_hour(monkeypatch):
    """Somebody has to make it, and is to be told."""
    monkeypatch.setattr(registry, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(registry, "PATIENT_SECONDS", (3600,))

    def write():
        raise MlflowException("(sqlite3.OperationalError) database or disk is full [SQL: INSERT INTO runs]")

    with pytest.raises(MlflowAway, match=r"disk is full.*: make room"):
        registry.with_retries(write, patient=True)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_costs_time_only(output_dir, caplog):
    """The server is killed while the model is uploaded, and comes back after five seconds."""
    run_dir = output_dir / "run-1"
    run_dir.mkdir()
    save_full_model(run_dir / "model")
    (run_dir / "model" / "large.bin").write_bytes(os.urandom(60_000_000))  # an upload of a while
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        with server(output_dir, port):
            tracked = tracked_run(run_dir, f"http://127.0.0.1:{port}")
            registered = pool.submit(register, run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
            uploads = output_dir / "mlartifacts"
            while not list(uploads.rglob("models/*")):  # the upload has begun
                assert not registered.done()
                time.sleep(0.01)
        time.sleep(5)
        with server(output_dir, port):
            version = registered.result(timeout=120)
            assert "trying again" in caplog.text
            assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri) == version
            assert len(versions(tracked.uri, "panda-tiny")) == 1
            assert len(load_and_generate(version.uri, "hello", 3, tracked.uri)) > 0


@pytest.mark.slow
def test_a_run_that_mlflow_never_answered_is_registered_when_it_is_back(run_dir, monkeypatch, caplog):
    """Down for the whole run and longer than registration waits: the reason says how to go on, and that works."""
    save_full_model(run_dir / "model")
    trained(run_dir, steps=3)
    port = free_port()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(registry, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(registry, "PATIENT_SECONDS", ())
    settings = TrackingSettings(mlflow_tracking_uri=f"http://me:hunter2@127.0.0.1:{port}")
    with pytest.raises(MlflowAway) as failed, open_run(settings, run_dir, RunMetadata({"model": "tiny"})) as tracked:
        register_run(tracked, "panda-tiny", TAGS, "hello")
    said = f"{run_dir / 'model'} is complete but not registered: MLflow does not answer"
    assert str(failed.value).startswith(said) and str(failed.value).endswith("--resume --run_name run-1")
    assert reason_of_error(failed.value) is ExitReason.infrastructure  # the next unattended run goes on with it
    assert "trying again" in caplog.text and "hunter2" not in caplog.text + str(failed.value)
    with server(run_dir.parent, port), open_run(settings, run_dir, RunMetadata({"model": "tiny"})) as tracked:
        version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
        assert version.uri == "models:/panda-tiny/1" and text
    assert connect(f"sqlite:///{run_dir.parent}/mlflow.db").get_run(tracked.run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_that_asks_for_a_password_gets_it_from_the_environment(run_dir, monkeypatch, caplog):
    """Without it nothing is lost, only not sent; with it the run and its model arrive, and the password stays here."""
    save_full_model(run_dir / "model")
    trained(run_dir, steps=3)
    port = free_port()
    with server(run_dir.parent, port), guarded(port, "hunter2") as uri:
        settings = TrackingSettings(mlflow_tracking_uri=uri)
        with open_run(settings, run_dir, RunMetadata({"model": "tiny"})) as tracked:
            pass
        assert tracked.run_id is None and "sent later" in caplog.text
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "panda")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
        assert tracked.sync() and tracked.run_id
        version, text = register_run(tracked, "panda-tiny", TAGS, "hello")
        assert version.uri == "models:/panda-tiny/1" and text
        stored = [path for path in (run_dir.parent / "mlartifacts").rglob("*") if path.is_file()]
    assert stored and not [path for path in stored if b"hunter2" in path.read_bytes()]
    assert b"hunter2" not in (run_dir.parent / "mlflow.db").read_bytes() and "hunter2" not in caplog.text


def ask(process: subprocess.Popen, port: int, request: dict, timeout_seconds: float = 120) -> dict:
    """POST to /invocations as soon as the server is up."""
    deadline = time.monotonic() + timeout_seconds
    body = json.dumps(request).encode()
    while True:
        try:
            call = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
            )
            return json.loads(urllib.request.urlopen(call, timeout=60).read())
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the model server did not start"
            time.sleep(0.5)
