"""Options of the sockets of links, and what the kernel knows about the other end."""

from __future__ import annotations

import socket
import struct

_BUFFER = 256 << 10
"""Bytes asked for the kernel's buffers: enough to stay busy, little enough for a small frame not to wait long."""

_SYN_RETRIES = 4
"""A host that does not answer a dial is given up after half a minute; its kernel answers, however busy it is."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))
"""An idle host is asked after 1 s, then every second, and given up after 3 questions."""

# struct tcp_info (linux/tcp.h): eight bytes, the third of which counts retransmissions of the oldest segment that is
# not acknowledged, then words of four bytes.
_RETRANSMITS = 2
_UNACKNOWLEDGED = struct.Struct("@24xI28xI")
_INFO_BYTES = _UNACKNOWLEDGED.size
_MOST_RETRANSMITS = 4
_MOST_SILENCE = 3000
"""Milliseconds; four retransmissions, each after twice the time of the last, take about as long."""


def tune(sock: socket.socket) -> None:
    """Set the options of a connected socket."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def tune_dial(sock: socket.socket) -> None:
    """Set the options of a TCP socket that is to connect."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _SYN_RETRIES)


def unanswered(sock: socket.socket) -> bool:
    """Return whether the other end's kernel has left data unacknowledged for some seconds.

    TCP_USER_TIMEOUT is not used for this: it also ends connections to a host that is well but whose process has not
    read for that long, because its loop was busy (measured: after 4.6 s with 4 s; with this, never).
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES:
        return False
    unacknowledged, silence = _UNACKNOWLEDGED.unpack(info)
    return bool(unacknowledged and info[_RETRANSMITS] >= _MOST_RETRANSMITS and silence >= _MOST_SILENCE)
