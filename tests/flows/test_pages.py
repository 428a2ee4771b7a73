"""What people see of a run in Prefect and in a pipe: names, last log lines, artifacts, the form, tables."""

import logging
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from configs.load import load
from data_prep.errors import CorpusError
from flows.cli import console
from flows.parts import overview
from flows.parts.form import CHANGED_FIRST, add_result, flow_of_settings, read, run_title
from flows.parts.lifetime import begin
from tasks.reporting import model_markdown
from tasks.stage import stage
from tasks.train import losses_in_words
from tests.support.stack import wait_for

MODEL = {"name": "panda-x", "version": 3, "uri": "models:/panda-x/3", "prompt": "What is `a`?"}
REPORT = {
    "records_in": 1907, "accepted": 1845, "rejected": {"wrong_type": 5}, "dropped": {"duplicate": 57},
    "validation_records": 30, "tokens": 38023, "target_tokens": 17781, "rows": 75, "max_seq_length": 512,
    "utilisation": 0.99, "sources": {"instruction": {"records": 1719, "share": 0.83}},
}  # fmt: skip
LOSSES = {"before": {"instruction": 7.5, "all": 7.4720}, "after": {"instruction": 1.9, "all": 2.3073}}
SUMMARY = {
    "data": REPORT, "losses": LOSSES, "model": {**MODEL, "sample": "x"},
    "training": {"steps": 30, "target_tokens": 106686, "first_loss": 7.5, "last_loss": 1.97, "seconds": 17.6},
    "gate": {"promoted": False, "reasons": ["not better than models:/panda-x/2"], "slices": [], "checks": []},
}  # fmt: skip


@pytest.fixture
def client(prefect_server):
    """A client of the shared server; runs of this process report to it, with their logs."""
    settings = {**prefect_server.settings, PREFECT_LOGGING_TO_API_ENABLED: True}
    with temporary_settings(settings), get_client(sync_client=True) as found:
        yield found


@stage("count", says=lambda result: f"{result} records")
def count(number: int) -> int:
    if number < 0:
        raise CorpusError("corpus.json, line 3: no target")
    return number


def logs_of(client, run_id) -> list[str]:
    APILogWorker.drain_all(timeout=10)
    return [entry.message for entry in client.read_logs(LogFilter(flow_run_id={"any_": [run_id]}), limit=200)]


class TestRun:
    def test_a_stage_ends_with_its_numbers_under_its_own_name(self, client):
        @flow(name="counting")
        def counting():
            begin()
            return count(1907)

        state = counting(return_state=True)
        assert state.result() == 1907
        run = state.state_details.flow_run_id

        def told() -> list[tuple[str, str]]:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
            return [(task.name, task.state.message) for task in tasks if task.state]

        wait_for(lambda: told() == [("count", "1907 records")], 30, "the server to have recorded how the task ended")
        assert "Finished in state Completed('1907 records')" in logs_of(client, run)

    def test_the_configuration_is_composed_once(self, client, monkeypatch):
        """For the name of the run and for the run; a later one reads its files anew."""
        composed = []
        monkeypatch.setattr("flows.parts.form.load", lambda *given: composed.append(given) or load(*given))
        function = lambda **parameters: read(parameters, goes_on=True).settings.model  # noqa: E731  # has no name to Prefect
        tiny = flow_of_settings(function, names={"model"}, name="tiny", flow_run_name=run_title)
        assert [tiny(model=name) for name in ("panda-tiny", "llama-7b")] == ["panda-tiny", "llama-7b"]
        assert [given["model"] for given, *_ in composed] == ["panda-tiny", "llama-7b"]

    def test_a_mistake_of_the_user_has_no_traceback(self, client, caplog):
        @flow(name="failing")
        def failing():
            begin()
            return count(-1)

        with caplog.at_level(logging.INFO):
            state = failing(return_state=True)
        with pytest.raises(CorpusError):
            state.result()
        said = "\n".join(logs_of(client, state.state_details.flow_run_id))
        assert "corpus.json, line 3: no target" in said
        assert "Traceback" not in said and "Traceback" not in caplog.text and "NoneType" not in said

    def test_a_mistake_in_a_program_keeps_its_traceback(self, client):
        @flow(name="broken")
        def broken():
            begin()
            return 1 / 0

        state = broken(return_state=True)
        assert "ZeroDivisionError" in "\n".join(logs_of(client, state.state_details.flow_run_id))

    def test_the_name_says_what_came_of_it(self, client):
        @flow(name="named", flow_run_name="2026-11-24 panda-tiny on stories: LoRA")
        def named():
            add_result(SUMMARY)

        run = client.read_flow_run(named(return_state=True).state_details.flow_run_id)
        assert run.name == "2026-11-24 panda-tiny on stories: LoRA → version 3, challenger"

    def test_a_name_that_cannot_be_changed_costs_nothing(self, client, monkeypatch, caplog):
        monkeypatch.setattr("flows.parts.form.get_client", lambda **_: 1 / 0)

        @flow(name="named")
        def named():
            add_result(SUMMARY)

        assert named(return_state=True).is_completed()

    def test_overview_is_an_artifact(self, client):
        @flow(name="shown")
        def shown():
            overview.show(SUMMARY, {"directory": "`/runs/1`"})

        run = shown(return_state=True).state_details.flow_run_id
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [run]}))
        assert [artifact.key for artifact in found] == ["overview"]
        assert "/runs/1" in found[0].data

    def test_an_overview_that_cannot_be_made_costs_nothing(self, monkeypatch, caplog):
        monkeypatch.setattr("flows.parts.overview.create_markdown_artifact", lambda *_, **__: 1 / 0)
        overview.show(SUMMARY)
        assert "no overview of the run" in caplog.text


class TestOverview:
    @pytest.mark.parametrize(
        "said",
        [
            "**panda-x version 3, challenger**",
            "| records in | 1,907 |",
            "| accepted | 1,845, 30 of them held out |",
            "| rejected | 5 (wrong_type 5) |",
            "| dropped | 57 (duplicate 57) |",
            "| tokens | 38,023, 17,781 of them targets |",
            "| all | 7.4720 | 2.3073 |",
            "It stays challenger:\n\n- not better than models:/panda-x/2",
        ],
    )
    def test_the_whole_story(self, said):
        assert said in overview.story(SUMMARY)

    def test_of_a_run_that_ended_early(self):
        text = overview.story({"data": REPORT, "outcome": {"name": "SkippedNoNewData", "message": "nothing new"}})
        assert text.startswith("**SkippedNoNewData**: nothing new") and "1,907" in text and "Gate" not in text

    def test_nothing_held_out_is_said(self):
        nothing = {"before": {}, "after": {}}
        assert "Nothing is held out" in overview.story({**SUMMARY, "losses": nothing})
        assert losses_in_words(nothing) == "nothing is held out"


class TestModelArtifact:
    @pytest.mark.parametrize("text", ["<b>bold</b> <|im_end|>", "# head", "- a\n- b", "```\ncode\n```", "&lt;", "* "])
    def test_whatever_it_writes_is_shown_as_it_is(self, text):
        shown = model_markdown({**MODEL, "sample": text})
        fence = re.search(r"it writes:\n\n(`{3,})\n", shown)[1]
        assert f"{fence}\n{text.strip()}\n{fence}" in shown and fence not in text

    def test_no_text_is_said(self):
        assert "No text" in model_markdown({**MODEL, "sample": " \n"})


def test_the_form_begins_with_what_people_change_first():
    from prefect.utilities.callables import parameter_schema

    from flows.panda_prepare import SETTINGS, panda_prepare
    from flows.panda_train import panda_train

    places = {name: field["position"] for name, field in parameter_schema(panda_train).properties.items()}
    in_order = sorted(places, key=places.__getitem__)
    assert len(CHANGED_FIRST) == 20 and in_order[:20] == list(CHANGED_FIRST)
    assert len(in_order) > 80
    in_order = sorted((field["position"], name) for name, field in parameter_schema(panda_prepare).properties.items())
    assert [name for _, name in in_order][:2] == ["conf_path", "model"] and len(in_order) == len(SETTINGS) + 2


class TestTables:
    NAME = "/corpora/" + "a-very-long-name-" * 12 + "end.jsonl"

    def test_names_are_whole_where_they_are_piped(self, capsys):
        table = console.plain_table(2)
        table.add_row("corpus", self.NAME)
        console.stdout_console().print(table)
        assert self.NAME in capsys.readouterr().out

    def test_names_are_folded_in_a_narrow_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "60")
        table = console.plain_table(2)
        table.add_row("corpus", self.NAME)
        console.stdout_console().print(table)
        assert self.NAME in "".join(capsys.readouterr().out.replace("corpus", "").split())

    def test_every_command_prints_through_it(self):
        """A console of its own would cut again; the rest of rich is for building tables."""
        flows = Path(__file__).parents[2] / "flows"
        makers = [path.name for path in flows.rglob("*.py") if re.search(r"\bConsole\(", path.read_text())]
        assert makers == ["console.py"]

    def test_lineage_in_a_pipe(self):
        facts = {
            "version": "models:/panda-x/1", "aliases": ["champion"], "ancestors": [], "base": self.NAME,
            "run_id": uuid.uuid4().hex, "run_dir": self.NAME, "code": {"commit": "c" * 40, "changed": "false"},
            "gate": {"result": "passed", "reasons": "the first version " * 20}, "taken_down": [],
            "plan": {"fingerprint": "f" * 32, "path": self.NAME},
            "corpus": {"fingerprint": "f" * 32, "files": [{"file": self.NAME, "bytes": 1, "xxh3": "a", "now": "gone"}]},
        }  # fmt: skip
        program = (
            "from flows.cli.console import stdout_console; from flows.cli.registry import _print_facts; "
            f"_print_facts(stdout_console(), {facts!r})"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.count(self.NAME) == 4 and "…" not in done.stdout
        assert len(done.stdout.splitlines()) == 8
