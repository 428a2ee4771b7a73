"""A webhook of MLflow tells others of a new champion: what docs/operations.md says, with a real server and receiver."""

from cryptography.fernet import Fernet
from mlflow import MlflowClient

from tests.support.mlflow_fixtures import server
from tests.support.receiver import receiving
from tests.support.stack import wait_for
from training.launch.processes import free_port
from training.registry.versions import CHAMPION, Registry


def test_a_new_champion_is_told(output_dir, monkeypatch):
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")  # the defaults take https and public addresses alone
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    port = free_port()
    with server(output_dir, port), receiving() as (door, received):
        uri = f"http://127.0.0.1:{port}"
        client = MlflowClient(uri, uri)
        client.create_webhook(
            "deploy", f"http://127.0.0.1:{door}/", events=["model_version_alias.created"], secret="of both"
        )
        client.create_registered_model("panda-llama-7b")
        run = client.create_run("0").info
        client.create_model_version("panda-llama-7b", source=f"{run.artifact_uri}/model", run_id=run.run_id)
        registry = Registry(uri)
        registry.set_alias(registry.resolve("models:/panda-llama-7b/1"), CHAMPION)
        wait_for(lambda: received, 60, "the webhook")
    assert received[0]["data"] == {"name": "panda-llama-7b", "alias": "champion", "version": "1"}
