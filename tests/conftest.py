"""What tests of several folders share."""

import pytest

from flows.stack import prefect_server as server
from tests.support.tokenizers import bytes_dir, bytes_tokenizer, llama_dir, llama_tokenizer, smollm2_dir

__all__ = ["bytes_dir", "bytes_tokenizer", "llama_dir", "llama_tokenizer", "smollm2_dir"]  # fixtures


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """One light Prefect server for many runs, so that each does not start its own (6 s); own database, own port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        patch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # answers nothing, so a temporary one starts
        with server.connected() as wait_until_up:
            wait_until_up()
            url = server.api_url()
            patch.undo()  # only the tests that ask for the server see it
            yield url


@pytest.fixture
def use_prefect_server(prefect_server, monkeypatch):
    """Runs of this test report to the shared server."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server)
