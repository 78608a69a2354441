"""Keep connections alive, and find those of this process."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

KEEPALIVE = 30  # seconds until a connection is ended whose other side has vanished


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask the other side's kernel whether it is still there, and end the connection if it is not.

    A side that vanishes is noticed within KEEPALIVE seconds; one that is merely busy answers, however long it is.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE // 2),
        ("TCP_KEEPALIVE", KEEPALIVE // 2),  # macOS's name for it
        ("TCP_KEEPINTVL", KEEPALIVE // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * KEEPALIVE),  # the same for what is sent and not acknowledged
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tcp_sockets(port: int, far: bool = False) -> Iterator[socket.socket]:
    """Yield this process's TCP connections from the local port `port`, or with `far` those to the port `port`.

    Each is a copy of the socket, closed when the next is asked for. Yields nothing on Windows, which has no /dev/fd.
    """
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []:
        with contextlib.suppress(OSError):  # closed in the meantime, or not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    near, peer = sock.getsockname(), sock.getpeername()
                    if sock.family in (socket.AF_INET, socket.AF_INET6) and (peer if far else near)[1] == port:
                        yield sock
