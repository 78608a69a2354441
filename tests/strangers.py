"""Strangers who know no secret, to be set on a server: raw HTTP/2, on as many connections as it takes.

    python tests/strangers.py PORT KIND [KIND …]

Each kind goes on until the process is killed, as fast as the server lets it:

    idle      1,100 TCP connections on which not a byte is sent
    preface   1,100 connections that begin with HTTP/2 and open no stream
    silent    100 connections with a stream each, one with 500: no answer is ever sent
    deaf      8 streams that read nothing (window 0) and send what nobody has asked for
    big       an answer of 1.5 GB
    cancel    streams that are opened and cancelled
    noise     answers that are no frames, at random
"""

import contextlib
import os
import random
import socket
import struct
import sys
import threading
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def header(name, value):
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


REQUEST = b"".join(
    header(name, value)
    for name, value in (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/fl_iot.Training/Join"),
        (b":authority", b"x"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    )
)


class Connection:
    """A connection of HTTP/2 with one stream, which keeps to the server's windows."""

    def __init__(self, port, window=65535):
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)
        self.sock.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
        self.changed, self.windows, self.ended = threading.Condition(), {0: 65535, 1: 65535}, False
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        """Read frames until the end; keep what the server says of its windows."""
        file = self.sock.makefile("rb")
        self.sock.settimeout(None)
        with contextlib.suppress(OSError, IndexError, ValueError):
            while not self.ended:
                head = file.read(9)
                length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                stream = int.from_bytes(head[5:], "big")
                payload = file.read(length)
                if kind == SETTINGS and not flags & 1:
                    self.sock.sendall(frame(SETTINGS, 1, 0))
                with self.changed:
                    if kind == WINDOW_UPDATE and stream in self.windows:
                        self.windows[stream] += struct.unpack(">I", payload)[0]
                    self.ended = kind == GOAWAY or (kind == RST_STREAM and stream == 1)
                    self.changed.notify_all()
        self.close()

    def close(self):
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def open(self, stream=1):
        self.sock.sendall(frame(HEADERS, 4, stream, REQUEST))

    def send(self, data, length=None):
        """Send a message of gRPC that says it has `length` bytes. Raises OSError if the stream has ended."""
        data = b"\0" + struct.pack(">I", len(data) if length is None else length) + data
        while data:
            with self.changed:
                self.changed.wait_for(lambda: self.ended or min(self.windows.values()) > 0, 5)
                if self.ended:
                    raise OSError
                part, data = data[: (size := min(16384, *self.windows.values()))], data[size:]
                self.windows = {stream: window - len(part) for stream, window in self.windows.items()}
            self.sock.sendall(frame(DATA, 0, 1, part))


def hold(port, greet):
    """Keep 1,100 connections open."""
    held = []
    while True:
        while len(held) < 1100:
            sock = socket.create_connection(("127.0.0.1", port), timeout=5)
            sock.sendall(greet)
            sock.setblocking(False)
            held.append(sock)
        time.sleep(0.2)
        for sock in list(held):
            try:
                ended = sock.recv(4096) == b""
            except BlockingIOError:
                continue
            except OSError:
                ended = True
            if ended:
                held.remove(sock)
                sock.close()


def idle(port):
    hold(port, b"")


def preface(port):
    hold(port, PREFACE + frame(SETTINGS, 0, 0))


def silent(port):
    held = []
    while True:
        held = [connection for connection in held if not connection.ended]
        while len(held) < 100:
            held.append(Connection(port))
            for stream in range(1, 1000 if len(held) == 1 else 2, 2):
                held[-1].open(stream)
        time.sleep(0.2)


def deaf(port):
    connections = [Connection(port, window=0) for _ in range(8)]
    for connection in connections:
        connection.open()
    while not all(connection.ended for connection in connections):
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.send(b"\0" * 20_000)


def big(port):
    connection = Connection(port)
    connection.open()
    connection.send(b"\0" * (200 << 20), 1500 << 20)


def cancel(port):
    connection = Connection(port)
    for stream in range(3, 20_001, 2):
        connection.open(stream)
        connection.sock.sendall(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))
    connection.close()


def noise(port):
    connection = Connection(port)
    connection.open()
    while True:
        connection.send(os.urandom(random.randrange(2000)))
        time.sleep(0.01)


def keep_up(port, act):
    while True:
        try:
            act(port)
        except OSError:
            time.sleep(0.05)


if __name__ == "__main__":
    os.nice(19)  # as if they were other machines: they take no core from the server
    for kind in sys.argv[2:]:
        threading.Thread(target=keep_up, args=(int(sys.argv[1]), globals()[kind]), daemon=True).start()
    time.sleep(300)
