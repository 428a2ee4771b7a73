"""The registry on real databases and a real server: one version per model, no copies, no pickles, and it answers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.training.mlflow_fixtures import server
from tests.training.tiny_models import save_adapter, save_full_model
from training.machine import free_port
from training.mlflow_sync import connect
from training.registry import load_and_generate, load_served, register
from training.settings import TrackingSettings
from training.tracking import Facts, TrackedRun, open_run

TAGS = {"panda.corpus": "c" * 32, "panda.plan": "p" * 32}


def tracked_run(run_dir: Path, uri: str | None = None) -> TrackedRun:
    """A finished MLflow run for this directory."""
    with open_run(TrackingSettings(mlflow_tracking_uri=uri), run_dir, Facts({"model": "tiny"})) as tracked:
        tracked.wait_for_run_id()
    return tracked


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


def test_registering_again_gives_the_same_version_until_the_model_changes(run_dir):
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    first = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri) == first
    (stored,) = versions(tracked.uri, "panda-tiny")
    assert stored.tags["panda.corpus"] == "c" * 32 and stored.run_id == tracked.run_id
    save_full_model(run_dir / "model2", seed=5)
    (run_dir / "model").rename(run_dir / "old")
    (run_dir / "model2").rename(run_dir / "model")
    assert register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri).version == 2


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
from training.registry import register
run_dir, run_id, uri = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
print("ready", flush=True)
register(run_dir, run_id, "panda-tiny", {"panda.corpus": "c"}, uri)
print("done", flush=True)
"""


def test_killed_at_any_moment_it_is_one_version(run_dir):
    """Registration is killed at five random moments of its duration, then tried once more."""
    save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    command = [sys.executable, "-c", REGISTER, str(run_dir), tracked.run_id, tracked.uri]
    generator = random.Random(time.time())
    moments = sorted(generator.uniform(0.0, 1.0) for _ in range(5))
    duration = 3.0
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "ready\n"
        started = time.monotonic()
        try:
            process.wait(moment * duration)
            duration = time.monotonic() - started
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    assert len(versions(tracked.uri, "panda-tiny")) == 1, f"killed at {moments} of {duration} s"
    assert len(load_and_generate(version.uri, "hello", 3, tracked.uri)) > 0
    client = connect(tracked.uri)
    experiment = client.get_experiment_by_name("panda-train").experiment_id
    assert len(client.search_logged_models([experiment])) == 1


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


ALONE = """
import sys
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
print(repr(model.predict({"prompt": ["hello"]}, params={"max_new_tokens": 8})[0]))
names = {name.partition(".")[0] for name in sys.modules}
assert not names & {"training", "data_prep", "flows", "tasks", "configs", "prefect", "deepspeed"}, names
"""


def test_it_loads_without_this_project(run_dir, tmp_path):
    """In an isolated interpreter elsewhere: nothing of the project can be imported, nothing of it is needed."""
    model = save_full_model(run_dir / "model")
    tracked = tracked_run(run_dir)
    version = register(run_dir, tracked.run_id, "panda-tiny", TAGS, tracked.uri)
    command = [sys.executable, "-I", "-c", ALONE, tracked.uri, version.uri]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == repr(greedy(model, run_dir / "model", "hello", 8))
    (requirements,) = (run_dir.parent / "mlartifacts").rglob("requirements.txt")
    names = {line.partition("==")[0] for line in requirements.read_text().splitlines()}
    assert names == {"mlflow", "torch", "transformers", "safetensors", "accelerate"}


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
