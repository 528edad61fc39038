"""Checks of the network interfaces that NCCL and gloo use, before ranks try to connect through them."""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence

from sdxl_trainer.configs.problems import Problem

LOOPBACK = ("127.", "::1")


def check_interfaces(environment: Mapping[str, str], interfaces: Sequence[str], use_nccl: bool) -> Iterator[Problem]:
    """Yield a problem for each variable that names only network interfaces which this node does not have.

    Gloo takes whole names. NCCL takes beginnings of names, whole names after `=`, and exclusions after `^`.

    Args:
        environment: holds GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if they are set.
        interfaces: names of this node's interfaces.
    """
    usable = [name for name in interfaces if name != "lo"]
    rule = f"names no network interface of {socket.gethostname()}"
    gloo = environment.get("GLOO_SOCKET_IFNAME", "")
    if missing := [name for name in gloo.split(",") if name and name not in interfaces]:
        yield Problem("GLOO_SOCKET_IFNAME", ",".join(missing), rule, f"it has {', '.join(usable) or 'only lo'}")
    nccl = environment.get("NCCL_SOCKET_IFNAME", "")
    if not use_nccl or not nccl or nccl.startswith("^"):
        return
    names = nccl.removeprefix("=").split(",")
    matches = str.__eq__ if nccl.startswith("=") else str.startswith
    if not any(matches(interface, name) for interface in interfaces for name in names):
        yield Problem("NCCL_SOCKET_IFNAME", nccl, rule, f"it has {', '.join(usable) or 'only lo'}")


def check_host_address(environment: Mapping[str, str], host: str, address: str | None) -> Iterator[Problem]:
    """Yield a problem if gloo would give the other nodes an address at which they reach only themselves.

    Without GLOO_SOCKET_IFNAME gloo listens at the address of the node's own name, which Debian maps to 127.0.1.1.

    Args:
        environment: holds GLOO_SOCKET_IFNAME, if it is set, and MASTER_ADDR.
        host: name of this node.
        address: its address; None if the name cannot be resolved.
    """
    if environment.get("GLOO_SOCKET_IFNAME") or (address is not None and not address.startswith(LOOPBACK)):
        return
    if (resolve_host(environment.get("MASTER_ADDR", "")) or "").startswith(LOOPBACK):
        return  # all nodes of the job are on this machine
    rule = f"is not set, and the name of this node, {host}, " + (
        "cannot be resolved" if address is None else f"resolves to {address}, which other nodes cannot reach"
    )
    cure = "set it to the interface that the nodes share, such as eth0, or correct the name in /etc/hosts"
    yield Problem("GLOO_SOCKET_IFNAME", None, rule, cure)


def check_network(use_nccl: bool, world_size: int) -> Iterator[Problem]:
    """Yield problems of this node's network interfaces and of its name."""
    yield from check_interfaces(os.environ, [name for _, name in socket.if_nameindex()], use_nccl)
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, DeepSpeed's
    if ranks_here and int(ranks_here) < world_size:
        host = socket.gethostname()
        yield from check_host_address(os.environ, host, resolve_host(host))


def resolve_host(name: str) -> str | None:
    """Return the IPv4 address of a host name, or None if it cannot be resolved."""
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None
