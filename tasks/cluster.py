"""Data preparation beyond one machine: the units of a stage are made by the workers of a Dask cluster.

In: the address of a Dask scheduler. Out: a `FanOut` for `shard_records` and `tokenize_records`, whose calls become a
few Prefect tasks a worker, each with a batch of units. What a lost worker was at is given to another one, which finds
the units that are done in the store; so nothing changes but the time. A scheduler that is lost is waited for, with
workers of its own, for ten minutes.
Cost: 2 to 5 s a stage more than processes of this machine take; the workers read and write the files themselves.

Every worker (one thread each: `dask worker ADDRESS --nthreads 1 --nworkers auto`) has this project on its Python path,
sees the working directory, corpus, tokenizer and `cache_dir` under the same paths, and reaches the Prefect server.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.settings import get_current_settings

from data_prep.errors import PandaError, StoreError
from data_prep.processes import Calls, FanOut
from training.launch.processes import LOOPBACK

BATCHES_PER_WORKER = 4  # so that a slow worker holds up the others by a quarter of its share, not by all of it
CONNECT_SECONDS = 10
AWAY_SECONDS = 600
RETRY_SECONDS = 10

logger = logging.getLogger(__name__)


class ClusterError(PandaError):
    """The Dask cluster cannot be used."""


def on_cluster(address: str | None) -> FanOut | None:
    """Fan out over the workers of the scheduler at ``address``; None = no cluster."""
    return partial(_call_in_workers, address) if address else None


def _call_in_workers(address: str, function: Callable[..., Any], calls: Calls) -> Iterator[tuple[str, Any]]:
    """What was not done when the scheduler went away is submitted again when it is back."""
    left, lost_at = dict(calls), 0.0
    while left:
        try:
            for key, result in _submitted(address, function, left):
                del left[key]
                lost_at = 0.0
                yield key, result
        except (CancelledError, ClusterError) as error:
            if isinstance(error, ClusterError) and not lost_at:
                raise  # it was never there
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > AWAY_SECONDS:
                raise ClusterError(
                    f"prepare_cluster={address!r}: the scheduler or its workers went away ({error}). What is finished "
                    "is kept; start them, then the same command goes on"
                ) from error
            logger.warning("prepare_cluster=%r went away; trying again in %d s", address, RETRY_SECONDS)
            time.sleep(RETRY_SECONDS)


def _submitted(address: str, function: Callable[..., Any], calls: Calls) -> Iterator[tuple[str, Any]]:
    """Each batch yields its results when all of it is done.

    :raises concurrent.futures.CancelledError: the connection to the scheduler is lost.
    """
    with _connected(address) as (runner, num_workers):
        from distributed.client import ClosedClientError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        stage = function.__module__.rpartition(".")[2]
        batches = _batches(calls, BATCHES_PER_WORKER * num_workers)
        named = [f"{stage}: batch {number + 1} of {len(batches)}" for number in range(len(batches))]
        try:
            futures = [
                runner.submit(
                    make_batch.with_options(task_run_name=name), {"work": partial(_make, os.getcwd(), function, batch)}
                )
                for name, batch in zip(named, batches, strict=True)
            ]
            for future in as_completed(futures):
                yield from future.result()
        except (CommClosedError, ClosedClientError) as error:  # it went while something was asked of it
            raise CancelledError(str(error)) from error
        except KilledWorker as error:
            raise StoreError(f"Workers died again and again at the same batch (out of memory?): {error}") from error


@contextmanager
def _connected(address: str) -> Iterator[tuple[Any, int]]:
    """(Prefect's task runner on the cluster, the number of its workers)."""
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise ClusterError("prepare_cluster needs Dask: pip install 'panda-train[dask]'") from None
    _check_server_is_reachable(address)
    with DaskTaskRunner(address=address, client_kwargs={"timeout": CONNECT_SECONDS}) as runner:
        try:
            num_workers = sum(runner.client.nthreads().values())
        except OSError as error:
            raise ClusterError(f"prepare_cluster={address!r}: no Dask scheduler answers there ({error})") from error
        if not num_workers:
            raise ClusterError(f"prepare_cluster={address!r}: no worker there; start some: dask worker {address}")
        yield runner, num_workers


def _check_server_is_reachable(address: str) -> None:
    """Workers on other machines report to the Prefect server too."""
    api_url = get_current_settings().api.url or ""
    if urlsplit(api_url).hostname in LOOPBACK and urlsplit(address).hostname not in LOOPBACK:
        raise ClusterError(
            f"prepare_cluster={address!r}: its workers cannot report to the Prefect server at {api_url}; "
            "set PREFECT_API_URL to a server that other machines can reach"
        )


def _batches(calls: Calls, num_batches: int) -> list[Calls]:
    """Dealt out like cards: calls come largest first, so that batches are about as long as each other."""
    items = list(calls.items())
    return [dict(items[first::num_batches]) for first in range(min(num_batches, len(items)))]


@task(cache_policy=NO_CACHE, persist_result=False)
def make_batch(work: Callable[[], Any]) -> Any:
    """What a worker runs. The work is a function without arguments, for Prefect looks into every argument."""
    return work()


def _make(directory: str, function: Callable[..., Any], calls: Calls) -> list[tuple[str, Any]]:
    """In a worker: the calls of a batch, one after another, in the directory the run was started in."""
    try:
        os.chdir(directory)
    except OSError as error:
        raise ClusterError(f"{socket.gethostname()} does not see {directory}: {error.strerror}") from None
    return [(key, function(*arguments)) for key, arguments in calls.items()]
