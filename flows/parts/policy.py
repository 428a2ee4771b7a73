"""When a run need not train: its turn came too late, or the corpus brings nothing new; and how often in a row.

In: the flow run, settings, results of the data stages, the registry. Out: a reason in words, or None.
Cost: one request to Prefect, two to MLflow.
"""

from collections.abc import Iterator
from itertools import count, takewhile

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import flow_run

from configs.settings import PandaSettings
from flows.parts.champion import registry_of
from flows.parts.stages import Prepared, target_tokens_of_corpus
from tasks.register import model_name
from training.registry.register import with_retries
from training.registry.versions import Version
from training.tracking.tags import CORPUS_TAG, TARGET_TOKENS_TAG

SCHEDULED_TAG = "auto-scheduled"
CORPUS_EVENT_TAG = "corpus-event"  # of runs that `flows.watch.corpus_events` has started
WAITING = "AwaitingConcurrencySlot"
SKIPPED = ("SkippedNoNewData", "SkippedStillRunning")
PAGE = 100


def is_scheduled() -> bool:
    """Whether a schedule started this run, not a person."""
    return SCHEDULED_TAG in (flow_run.tags or [])


def is_by_event() -> bool:
    """Whether the news of a changed corpus started this run."""
    return CORPUS_EVENT_TAG in (flow_run.tags or [])


def came_too_late() -> str | None:
    """A scheduled run that had to wait for another one is not wanted any more: the next one sees all the new data.

    Runs started by hand do wait; a deployment itself has only one way to treat runs above its limit.
    """
    if not is_scheduled():
        return None
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run.id)
    ordered = sorted(states, key=lambda state: state.timestamp)
    before_it_ran = takewhile(lambda state: not state.is_running(), ordered)  # started again, it may have to wait
    if any(state.name == WAITING for state in before_it_ran):
        return "another run was at work when this one was due; the next scheduled run will see all new data"
    return None


def skips_in_a_row() -> int:
    """How many scheduled runs of this deployment were skipped one after the other; this one is the last of them."""
    with get_client(sync_client=True) as client:
        before = _ended_before(client, client.read_flow_run(flow_run.id))
        return 1 + sum(1 for _ in takewhile(lambda run: run.state and run.state.name in SKIPPED, before))


def _ended_before(client: SyncPrefectClient, this: FlowRun) -> Iterator[FlowRun]:
    """Scheduled runs of the same deployment that have ended, the last one first."""
    wanted = FlowRunFilter.model_validate({
        "deployment_id": {"any_": [this.deployment_id]},
        "tags": {"all_": [SCHEDULED_TAG]},
        "state": {"type": {"any_": list(TERMINAL_STATES)}},
        "expected_start_time": {"before_": this.expected_start_time},
    })  # fmt: skip
    for page in count():
        found = client.read_flow_runs(
            flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=PAGE, offset=page * PAGE
        )
        yield from (run for run in found if run.id != this.id)
        if len(found) < PAGE:
            return


def nothing_new(settings: PandaSettings, prepared: Prepared) -> str | None:
    """Compare the corpus with the one the newest registered version was made of."""
    if not (is_scheduled() or is_by_event() or settings.min_new_target_tokens):
        return None
    newest = newest_version(settings)
    if newest is None or CORPUS_TAG not in newest.tags:
        return None
    if newest.tags[CORPUS_TAG] == prepared.corpus:
        return f"the corpus is the one that {newest.uri} was made of"
    return _too_few(settings.min_new_target_tokens, target_tokens_of_corpus(prepared.plan.report), newest)


def _too_few(wanted: int, target_tokens: int, newest: Version) -> str | None:
    gained = target_tokens - int(newest.tags.get(TARGET_TOKENS_TAG, 0))
    if gained >= wanted:
        return None
    return f"{gained:,} target tokens more than {newest.uri} was made of; min_new_target_tokens is {wanted:,}"


def newest_version(settings: PandaSettings) -> Version | None:
    """The newest version of the registered model this run would add to."""
    name = model_name(settings.registered_model_name, settings.model)
    versions = with_retries(lambda: registry_of(settings).versions(name))
    return versions[-1] if versions else None
