"""Where the ranks meet, and on which addresses they listen for each other: those of the interface MASTER_ADDR names.

In: address and port of machine 0. Out: torch's store, and the environment variables that gloo and NCCL read. Left to
themselves torch's store listens on every interface and gloo on whatever the name of the host means, none with a
password: on one machine all of it is for loopback, on several for the one network between them. Cost: one look at the
interfaces.
"""

import errno
import ipaddress
import os
import socket
from datetime import timedelta

import psutil
from torch.distributed import TCPStore

from data_prep.errors import PandaError

INTERFACE = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # "=": this one, not all whose names begin so
BACKLOG = 2048  # ranks that connect in the same moment
ANY_PORT = 9  # for a route nobody sends anything on


class RendezvousError(PandaError):
    """The ranks cannot meet at the address they were given."""


def meet(host: str, port: int, world_size: int, is_first: bool, timeout: timedelta) -> TCPStore:
    """torch's store: rank 0 listens at exactly this address (port 0 = any free one), all ranks are its clients."""
    if not is_first:
        return TCPStore(host, port, world_size, False, timeout)
    family, address = _own_address(host)
    try:
        listener = socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:  # a port that somebody else has taken meanwhile: trying again helps
            raise
        raise RendezvousError(
            f"MASTER_ADDR={host} (--master_addr) is no address of this machine, where rank 0 runs; give one of "
            "machine 0 (`hostname -I` lists them) that all machines reach"
        ) from error
    port = listener.getsockname()[1]
    return TCPStore(address, port, world_size, True, timeout, multi_tenant=True, master_listen_fd=listener.detach())


def _own_address(host: str) -> tuple[socket.AddressFamily, str]:
    """What a name means on machine 0 itself; Debian writes 127.0.1.1 beside it, where no other machine could come."""
    family, _, _, _, where = _resolved(host)
    address = str(where[0])
    if ipaddress.ip_address(address).is_loopback and host != "localhost" and not _is_address(host):
        raise RendezvousError(
            f"MASTER_ADDR={host}: on this machine the name means {address}, which others cannot reach; give the "
            "address of the network between the machines (`hostname -I` lists them), or 127.0.0.1 if there is one only"
        )
    return family, address


def listen_beside(host: str) -> None:
    """gloo and NCCL listen on the interface that leads to machine 0, unless the environment names another one."""
    name = interface_to(host)
    for variable, form in INTERFACE.items():
        if name:
            os.environ.setdefault(variable, form.format(name))


def interface_to(host: str) -> str | None:
    """The interface through which this machine reaches another (or itself); None when no route is known."""
    try:
        family, _, _, _, where = _resolved(host)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
            probe.connect((where[0], ANY_PORT))
            mine = ipaddress.ip_address(probe.getsockname()[0])
    except (OSError, RendezvousError):
        return None
    for name, addresses in psutil.net_if_addrs().items():
        known = [ipaddress.ip_address(one.address.split("%")[0]) for one in addresses if one.family == family]
        if mine in known or (mine.is_loopback and any(one.is_loopback for one in known)):
            return name
    return None


def _resolved(host: str) -> tuple:
    try:
        return min(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM), key=lambda found: found[0])  # IPv4 first
    except socket.gaierror as error:
        raise RendezvousError(f"MASTER_ADDR={host}: this name means no address here ({error.strerror})") from error


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
