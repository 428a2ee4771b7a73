"""`panda export` and `chat` as real commands on a registry with full weights and an adapter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.tiny_models import save_adapter, save_full_model
from tests.training.registry.test_register import greedy, tracked_run
from training.registry.register import register

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """An output directory with `panda-full` and its adapter `panda-adapter`."""
    root = tmp_path_factory.mktemp("verbs")
    for name in ("full", "adapter"):
        run_dir = root / "outputs" / name
        run_dir.mkdir(parents=True)
        if name == "full":
            save_full_model(run_dir / "model")
        else:
            save_adapter(root / "outputs" / "full" / "model", run_dir / "model")
        (run_dir / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        tracked = tracked_run(run_dir)
        register(run_dir, tracked.run_id, f"panda-{name}", {}, tracked.uri)
    return root / "outputs"


def command(outputs: Path, verb: str, *arguments: str) -> list[str]:
    where = ["--output_dir", str(outputs), "--cache_dir", str(outputs.parent / "cache")]
    return [sys.executable, "-m", "flows.cli.main", verb, *arguments, *where]


def panda(outputs: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    return warm.run(command(outputs, *arguments), ROOT, stdin=stdin)


def test_export_of_an_adapter(outputs, tmp_path):
    done = panda(outputs, "export", "panda-adapter", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kind"] == "streamed" and result["difference"]["top1_agreement"] == 1
    assert result["version"] == "models:/panda-adapter/1" and (tmp_path / "out" / "README.md").exists()
    again = panda(outputs, "export", "panda-adapter", str(tmp_path / "out"))
    assert again.returncode == 2 and "is there already" in again.stderr and "Traceback" not in again.stderr


def test_chat_is_a_conversation(outputs):
    done = panda(outputs, "chat", "panda-full", "--max_new_tokens", "6", stdin="hello\n/new\nhello\nworld\n/quit\n")
    assert done.returncode == 0, done.stderr
    answers = [line.removesuffix(" [...]") for line in done.stdout.split("\n")]
    from transformers import LlamaForCausalLM

    model_dir = outputs / "full" / "model"
    model = LlamaForCausalLM.from_pretrained(model_dir)
    first = greedy(model, model_dir, "hello", 6)
    assert answers[0] == answers[1] == first
    assert answers[2] == greedy(model, model_dir, f"hello{first}world", 6)


def test_a_version_that_is_not_there(outputs):
    done = panda(outputs, "chat", "models:/panda-full/7")
    assert done.returncode == 2 and "no such version" in done.stderr
