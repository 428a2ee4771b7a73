"""Asset events: corpus, plan and version say at the Prefect server what they were made from, in Prefect's own words.

In: results of the stages. Out: events ``prefect.asset.materialization.succeeded``, which automations can wait for, and
of which Prefect Cloud draws the lineage::

    panda://corpora/<fingerprint>  ->  panda://plans/<fingerprint>  ->  panda://models/<name>/<version>

The id of an event follows from its asset, so a run that finds something made before says nothing new. Cost: none; they
are sent beside the run.
"""

from uuid import NAMESPACE_URL, uuid5

from prefect.events import emit_event

from data_prep.plan.build import PlanResult
from training.run_files import Registered
from training.tracking.looks import only_a_look

MATERIALIZED = "prefect.asset.materialization.succeeded"


@only_a_look("the asset events")
def plan_made(plan: PlanResult, corpus: str) -> None:
    """A corpus and its plan, unless the plan was there before."""
    if plan.reused:
        return
    report = plan.report
    _made(_corpus(corpus), None, {"records_in": report["records_in"], "accepted": report["accepted"]})
    _made(_plan(plan), _corpus(corpus), {"rows": report["rows"], "target_tokens": report["target_tokens"]})


@only_a_look("the asset event")
def version_registered(version: Registered, plan: PlanResult) -> None:
    """A version of the registered model."""
    asset = f"panda://models/{version['name']}/{version['version']}"
    _made(asset, _plan(plan), {"uri": version["uri"]})


def _corpus(fingerprint: str) -> str:
    return f"panda://corpora/{fingerprint}"


def _plan(plan: PlanResult) -> str:
    return f"panda://plans/{plan.fingerprint}"


def _made(asset: str, of: str | None, payload: dict[str, object]) -> None:
    source = {"prefect.resource.id": of or "", "prefect.resource.role": "asset"}
    emit_event(
        MATERIALIZED,
        resource={"prefect.resource.id": asset},
        related=[source] if of else [],
        payload=payload,
        id=uuid5(NAMESPACE_URL, asset),
    )
