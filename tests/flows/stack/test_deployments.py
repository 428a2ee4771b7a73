"""Putting things onto a Prefect server while others do, too."""

import pytest
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.workers.process import ProcessWorker

from flows.panda_prepare import panda_prepare
from flows.stack.deployments import _ensure_pool, pool_template
from flows.stack.services import POOL


class JustBefore:
    """A client that looked before the worker of the same `panda up` made the pool."""

    def __init__(self, client):
        self.create_work_pool = client.create_work_pool
        self.update_work_pool = client.update_work_pool

    def read_work_pool(self, name):
        raise ObjectNotFound(http_exc=LookupError(name))


def test_a_worker_may_make_the_pool_at_the_same_moment(prefect_client):
    _ensure_pool(prefect_client)
    _ensure_pool(JustBefore(prefect_client))
    assert [pool.type for pool in prefect_client.read_work_pools() if pool.name == POOL] == ["process"]


def test_a_run_cannot_choose_its_command_or_environment(prefect_client):
    """Also where the worker, or an older version, has made the pool as Prefect does; one the owner wrote stays."""
    open_to_all = ProcessWorker.get_default_base_job_template()
    own = open_to_all | {"job_configuration": {"command": "nice python -m prefect.engine"}}
    client = prefect_client
    _ensure_pool(client)
    for before, after in ((open_to_all, pool_template()), (own, own)):
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=before))
        _ensure_pool(client)
        assert client.read_work_pool(POOL).base_job_template == after
    client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=pool_template()))
    deployment = panda_prepare.to_deployment("locked", work_pool_name=POOL)
    deployment_id = deployment.apply(work_pool_name=POOL)
    for name, value in (("command", "touch pwned"), ("env", {"PYTHONPATH": "/tmp"}), ("working_dir", "/tmp")):
        with pytest.raises(PrefectHTTPStatusError, match=f"'{name}' was unexpected"):
            client.create_flow_run_from_deployment(deployment_id, job_variables={name: value})
