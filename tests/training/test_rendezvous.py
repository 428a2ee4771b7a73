"""Where ranks meet and listen: at the address they are given, and at no other one."""

import errno
import socket
from datetime import timedelta

import psutil
import pytest

from training import rendezvous
from training.launch.exits import ExitReason, reason_of_error
from training.rendezvous import RendezvousError, interface_to, listen_beside, meet

SOON = timedelta(seconds=10)
LOOPBACK = next(name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found))


def test_the_store_listens_at_the_named_address_alone():
    store = meet("127.0.0.2", 0, 1, True, SOON)  # all of 127/8 is this machine
    mine = [one for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    assert [one.laddr.ip for one in mine if one.laddr.port == store.port] == ["127.0.0.2"]
    store.set("key", "value")
    assert meet("127.0.0.2", store.port, 1, False, SOON).get("key") == b"value"


def test_an_address_of_another_machine():
    with pytest.raises(RendezvousError, match=r"MASTER_ADDR=192\.0\.2\.1 .* is no address of this machine"):
        meet("192.0.2.1", 0, 2, True, SOON)


def test_a_port_that_is_taken_is_worth_another_try():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError) as caught:
        meet("127.0.0.1", other.getsockname()[1], 2, True, SOON)
    assert caught.value.errno == errno.EADDRINUSE
    assert reason_of_error(caught.value) is ExitReason.infrastructure


def test_a_name_that_means_loopback_on_machine_0_itself(monkeypatch):
    """As Debian writes it into /etc/hosts: the other machines would wait for ever."""
    found = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *_, **__: [found])
    with pytest.raises(RendezvousError, match=r"MASTER_ADDR=node1: .* means 127\.0\.1\.1, which others cannot reach"):
        meet("node1", 0, 2, True, SOON)


def test_a_name_that_means_nothing():
    with pytest.raises(RendezvousError, match=r"MASTER_ADDR=no\.such\.machine\.invalid"):
        meet("no.such.machine.invalid", 0, 2, True, SOON)


def test_gloo_and_nccl_listen_on_the_interface_to_machine_0(monkeypatch):
    for variable in rendezvous.INTERFACE:
        monkeypatch.setenv(variable, "")  # so that it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert interface_to("127.0.0.1") == interface_to("127.0.0.2") == LOOPBACK
    listen_beside("127.0.0.1")
    assert rendezvous.os.environ["GLOO_SOCKET_IFNAME"] == LOOPBACK
    assert rendezvous.os.environ["NCCL_SOCKET_IFNAME"] == "ib0"  # what the user says stays
