"""Putting things onto a Prefect server while others do, too."""

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.stack.deployments import _ensure_pool
from flows.stack.services import POOL


class JustBefore:
    """A client that looked before the worker of the same `panda up` made the pool."""

    def __init__(self, client):
        self.create_work_pool = client.create_work_pool

    def read_work_pool(self, name):
        raise ObjectNotFound(http_exc=LookupError(name))


def test_a_worker_may_make_the_pool_at_the_same_moment(prefect_server):
    with temporary_settings({PREFECT_API_URL: prefect_server}), get_client(sync_client=True) as client:
        _ensure_pool(client)
        _ensure_pool(JustBefore(client))
        assert [pool.type for pool in client.read_work_pools() if pool.name == POOL] == ["process"]
