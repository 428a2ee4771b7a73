"""Tell people: through the Prefect notification block that the setting `notify` names.

In: a flow run and its state, or a subject and text. Out: a message (webhook, Slack, mail, ...). One that cannot be sent
is a warning, never a failure. Cost: one request.
"""

import logging
from typing import Any

from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun, State

logger = logging.getLogger(__name__)


def on_bad_end(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """Flow hook: failed, crashed."""
    block = (flow_run.parameters or {}).get("notify")
    if block:
        tell(block, f"{flow.name} {flow_run.name}: {state.name}", f"{state.message}\n\nflow run {flow_run.id}")


def tell(block: str, subject: str, body: str) -> None:
    """Send one message."""
    try:
        import prefect.blocks.notifications  # noqa: F401  # half a second, and Block.load has to know their types

        Block.load(block, _sync=True).notify(body, subject=subject)  # type: ignore[call-arg, union-attr]  # Block.load may be async
    except Exception as error:
        logger.warning("notify=%r: %s", block, error)
