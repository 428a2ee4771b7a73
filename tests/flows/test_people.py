"""People are told and asked, for real: `notify` in a YAML file, a receiver on loopback, answers as of the form."""

import contextlib
import json
import shutil
import signal
import socket

import pytest

from tests.support import warm
from tests.support.stack import LONG, Stack, num_steps, running_stack, wait_for
from training.launch.processes import free_port
from training.registry.versions import Registry
from training.tracking.sync import TRAINING_VIEW
from training.tracking.tags import APPROVAL_TAG, COMMENT_TAG, GATE_TAG, REASONS_TAG

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1800)]
MODEL = "panda-panda-tiny"


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    with running_stack(tmp_path_factory.mktemp("people"), **warm.environment()) as up:
        yield up


@pytest.fixture(scope="module")
def first(stack: Stack):
    """(A run that has registered version 1, what was told of it)."""
    with stack.webhook("first") as (block, received):
        run = stack.start(stack.config("short", max_steps=6, notify=block))
        assert stack.end_of(run).name == "Completed"
        return run, received


@pytest.fixture
def registry(stack: Stack, first):
    return Registry(f"sqlite:///{stack.outputs('short')}/mlflow.db")


def subjects(received: list[dict[str, str]]) -> list[str]:
    return [message["subject"] for message in received]


class TestTold:
    def test_of_a_new_version(self, stack, first):
        run, received = first
        assert subjects(received) == [f"{MODEL} version 1 is the champion now"]
        assert "nothing to compare it with" in received[0]["body"] and f"/flow-run/{run}" in received[0]["body"]

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"warmup_steps": 5, "warmup_proportion": 0.5}, "contradict each other"),  # not valid as a whole
            ({"pretraining_data_dir": "/nowhere"}, "/nowhere"),
        ],
    )
    def test_of_a_failure(self, stack, wrong, said):
        with stack.webhook() as (block, received):
            run = stack.start(stack.config("wrong", notify=block, **wrong))
            assert stack.end_of(run).name == "UserError"
            wait_for(lambda: received, 60, "the message")
        assert received[0]["subject"].endswith(": UserError") and len(received) == 1
        assert said in received[0]["body"] and f"/flow-run/{run}" in received[0]["body"]

    def test_of_a_crash_by_the_worker(self, stack):
        with stack.webhook() as (block, received):
            run = stack.start(stack.config("crashed", notify=block, **LONG), until_stage="train")
            stack.wait_until_training(run, "crashed", 1)
            stack.engine(run).send_signal(signal.SIGKILL)
            assert stack.end_of(run, 120).type.value == "CRASHED"
            wait_for(lambda: received, 60, "the message")
        assert subjects(received) == [f"panda-train {stack.flow_run(run).name}: Crashed"]
        assert f"/flow-run/{run}" in received[0]["body"]
        stack.wait_for_log(run, "told 'panda-train")

    def test_of_a_cancellation_as_an_override_says(self, stack):
        with stack.webhook() as (block, received):
            conf = stack.config("cancelled", **LONG)
            run = stack.start(conf, until_stage="train", overrides=[f"notify={block}"])
            stack.wait_until_training(run, "cancelled", 1)
            stack.cancel(run)
            stack.wait_for_cancelled(run)
            wait_for(lambda: received, 60, "the message")
        assert subjects(received) == [f"panda-train {stack.flow_run(run).name}: Cancelled"]

    def test_of_schedules_that_train_nothing(self, stack, first):
        with stack.webhook() as (block, received):
            conf = stack.config("short", max_steps=6, notify=block, notify_after_skips=2)
            with stack.default_parameters(conf_path=conf), stack.schedule("--interval", "60"):
                wait_for(lambda: received, 400, "the message")
        assert subjects(received) == ["panda-train: 2 scheduled runs in a row were skipped"]
        skipped = {str(run.id): run.state for run in stack.scheduled_runs()}
        last = received[0]["body"].rsplit("/", 1)[-1]
        assert skipped[last].message in received[0]["body"]  # on a slow machine: that the one before was still at work
        assert f"the corpus is the one that models:/{MODEL}/1 was made of" in {s.message for s in skipped.values()}


class TestReceiverThatDoesNotAnswer:
    def test_is_no_failure(self, stack, first):
        """Nobody listens there; the log of the run says what is wrong, without the secret part of the address."""
        block = stack.block("down", free_port(), "services/T0/secret")
        conf = stack.config("short", max_steps=6, notify=block, registered_model_name="untold")
        run = stack.start(conf)
        assert stack.end_of(run).name == "Completed"
        stack.wait_for_log(run, "was not told: ConnectError")
        assert "services/T0/secret" not in stack.logs(run)

    def test_is_not_waited_for_for_long(self, stack):
        """It takes the connection and says nothing."""
        with contextlib.closing(socket.socket()) as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            block = stack.block("silent", silent.getsockname()[1])
            conf = stack.config("wrong", notify=block, pretraining_data_dir="/nowhere")
            run = stack.start(conf)
            assert stack.end_of(run).name == "UserError"
            stack.wait_for_log(run, "no answer for 10 s")


class TestApproval:
    @pytest.fixture
    def better(self, stack, first, registry):
        """Name and path of a configuration that makes a better version than the first one."""

        def config(name: str, **settings) -> str:
            uri = registry.uri
            wanted = {"max_steps": 40, "gate_records": 60, "require_approval": True, "mlflow_tracking_uri": uri}
            return stack.config(name, **wanted, **settings)

        return config

    def test_refused_after_the_comparison(self, stack, registry, better):
        with stack.webhook() as (block, received):
            run = stack.start(better("refused", notify=block))
            stack.wait_for_state(run, "Paused")
            text, waiting = stack.question(run), registry.versions(MODEL)[-1]
            assert not waiting.aliases and waiting.tags[APPROVAL_TAG] == "waiting" and GATE_TAG not in waiting.tags
            self.resuming_without_an_answer_changes_nothing(stack, run)
            stack.answer(run, False, "not today")
            state = stack.end_of(run)
            wait_for(lambda: len(received) > 1, 30, "the messages")
        assert (state.type.value, state.name) == ("COMPLETED", "NotApproved")
        assert state.message.startswith(f"{MODEL} version {waiting.version} stays challenger: refused: not today")
        assert subjects(received)[0] == f"{waiting.uri} waits for approval"
        assert subjects(received)[1].endswith(": NotApproved") and "not today" in received[1]["body"]
        for part in (f"Make {waiting.uri} the champion?", f"better than the champion models:/{MODEL}/1", "- gain: +",
                     "- worst slice: ", f"/runs/{waiting.run_id}{TRAINING_VIEW}>", f"/flow-run/{run}>"):  # fmt: skip
            assert part in text and part in received[0]["body"]
        version = registry.resolve(waiting.uri)
        assert version.aliases == ["challenger"] and version.tags[COMMENT_TAG] == "not today"
        assert version.tags[REASONS_TAG].startswith("refused: not today; better than")
        assert registry.champion(MODEL).version == 1
        stack.wait_for_log(run, "refused: not today")

    def resuming_without_an_answer_changes_nothing(self, stack, run):
        with stack.client() as client:
            client.resume_flow_run(run)
        assert stack.flow_run(run).state.name == "Paused"

    def test_without_an_answer_it_stays_challenger(self, stack, registry, better):
        conf = better("unanswered", approval_timeout_hours=5 / 3600, registered_model_name="unanswered")
        state = stack.end_of(stack.start(conf))
        assert (state.type.value, state.name) == ("COMPLETED", "NotApproved")
        assert "stays challenger: no answer: in " in state.message
        (version,) = registry.versions("unanswered")  # the first one is asked about as well
        assert version.aliases == ["challenger"] and version.tags[APPROVAL_TAG] == "no answer"
        assert version.tags[GATE_TAG] == "passed"

    def test_killed_while_waiting(self, stack, registry, better):
        """Nobody has answered: asked again. Answered, but killed before it could hear of it: the answer holds."""
        conf, before = better("killed"), len(registry.versions(MODEL))
        unanswered = self.paused(stack, conf)
        stack.engine(unanswered).send_signal(signal.SIGKILL)
        assert stack.end_of(unanswered, 120).type.value == "CRASHED"

        answered = self.paused(stack, conf)
        compared = (stack.newest_run("killed") / "report" / "gate_records.jsonl").stat().st_mtime_ns
        engine = stack.engine(answered)
        engine.send_signal(signal.SIGSTOP)
        stack.answer(answered, True, "well done")
        engine.send_signal(signal.SIGKILL)
        assert stack.end_of(answered, 120).type.value == "CRASHED"

        # Its version has this corpus, and that is no reason to leave it without a decision.
        last = stack.start(conf, min_new_target_tokens=1)
        state = stack.end_of(last)
        assert state.name == "Completed", state.message
        assert self.questions(stack, last) == 0
        stack.wait_for_log(last, "was decided before: approved: well done")
        assert len(list(stack.outputs("killed").glob("*/config.yaml"))) == 1
        assert (stack.newest_run("killed") / "report" / "gate_records.jsonl").stat().st_mtime_ns == compared
        versions = registry.versions(MODEL)
        assert len(versions) == before + 1 and versions[-1].aliases == ["champion"]
        assert versions[-1].tags[COMMENT_TAG] == "well done"

    def paused(self, stack, conf):
        run = stack.start(conf)
        stack.wait_for_state(run, "Paused")
        wait_for(lambda: stack.question(run), 30, "the form")
        return run

    def questions(self, stack, run):
        with stack.client() as client:
            states = client.read_flow_run_states(run)
        return sum(state.name == "Paused" for state in states)


class TestCorpusAlarm:
    """This week's feed gives one answer to everything; the champion has learnt from the one of last week."""

    @pytest.fixture(scope="class")
    def broken(self, stack, first):
        corpus = stack.folder / "broken-feed"
        shutil.copytree(stack.folder / "dataset" / "instruction_tuning", corpus)
        english = corpus / "english.json"
        records = json.loads(english.read_text())
        same = {"output": "I cannot help you with that."}  # some records of the sample are broken on purpose
        english.write_text(json.dumps([one | same if isinstance(one, dict) else one for one in records]))

        def config(name: str, **settings) -> str:
            uri = f"sqlite:///{stack.outputs('short')}/mlflow.db"
            return stack.config(
                name, instruction_tuning_data_dir=str(corpus), mlflow_tracking_uri=uri, max_steps=6, **settings
            )

        return config

    def test_is_told(self, stack, broken, registry):
        champion = registry.champion(MODEL).uri  # version 1, or one that a test before has made the champion
        with stack.webhook() as (block, received):
            run = stack.start(broken("told", notify=block), until_stage="train")
            assert stack.end_of(run).type.value == "COMPLETED"
        (message,) = received
        assert message["subject"].endswith(f": the corpus has changed since {champion}")
        assert "### one answer to many prompts: " in message["body"] and "english.json:" in message["body"]
        artifacts = stack.artifacts(run)
        assert artifacts["corpus-alarm"] in message["body"] and artifacts["corpus-alarm-picture"]

    def test_refused_it_is_not_trained_on(self, stack, broken):
        run = stack.start(broken("doubted", corpus_alarm="approve"))
        stack.wait_for_state(run, "Paused")
        wait_for(lambda: stack.question(run), 30, "the form")
        text = stack.question(run)
        assert text.startswith(f"Train {stack.newest_run('doubted').name} on this corpus?") and "english.json:" in text
        stack.answer(run, False, "the feed is broken")
        state = stack.end_of(run)
        assert (state.type.value, state.name) == ("COMPLETED", "NotApproved")
        assert "refused: the feed is broken" in state.message
        assert num_steps(stack.newest_run("doubted")) == 0

    def test_approved_it_is(self, stack, broken):
        run = stack.start(broken("trusted", corpus_alarm="approve"), until_stage="train")
        stack.wait_for_state(run, "Paused")
        wait_for(lambda: stack.question(run), 30, "the form")
        stack.answer(run, True, "meant so")
        assert stack.end_of(run).type.value == "COMPLETED"
        assert num_steps(stack.newest_run("trusted")) == 6
        stack.wait_for_log(run, "approved: meant so")
