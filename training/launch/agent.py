"""torchrun's agent, whose store listens at the address `--master-addr` names instead of on every interface.

    python -m training.launch.agent --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 ... -m training.worker --config ...

In: the command line of torchrun. Out: that of torchrun. Only the agent of machine 0 listens; on the other machines
torchrun itself does as well.
"""

from datetime import timedelta

from torch.distributed import TCPStore, run
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous

from training.rendezvous import meet


def bound(host: str, port: int, world_size: int, is_master: bool, timeout: timedelta, **_: bool) -> TCPStore:
    """What `StaticTCPRendezvous` asks of torch's `TCPStore`."""
    return meet(host, port, world_size, is_master, timeout)


if __name__ == "__main__":
    static_tcp_rendezvous.TCPStore = bound  # type: ignore[misc, assignment]  # torchrun has no option for it
    run.main()
