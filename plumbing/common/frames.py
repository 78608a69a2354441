"""What server and device say to each other over gRPC: frames, and which fields they may have.

frame     length of the frame (uint64), length of the header (uint32), header, arrays; little-endian
header    JSON: {"kind": text, "arrays": [length, …], and the fields of its kind}
arrays    bytes as they are: common/wire knows what they stand for
message   of gRPC: CHUNK bytes of a frame, and what is left in the last one

The server asks and the device answers, one frame for one frame, both of the same kind. A frame is read only after its
question was sent, so that gRPC's flow control holds back all else. Nothing is allocated by a length in a frame.

kind            question                                  answer
hello           version, frames, nonce                    version, frames, nonce, about, proof
task            proof, ticket, net, dataset_id            about, and one array: common/compare.trial
fit, evaluate   config, tensor_type, arrays               num_examples, loss, metrics, arrays
ping                                                      (is the device there?)
goodbye         proof, why, text                          (it has heard why the stream ends)
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator

from plumbing import VERSION

METHOD = "/fl_iot.Training/Join"
FRAMES = 2  # the version of all this
CHUNK = 2**18  # bytes of a message at most: LeNet5 with its header goes into one
FIRST = 2**16  # bytes of a frame without arrays at most, and of any before the other side has proved the secret
LENGTHS = struct.Struct("<QI")
ENTRIES = 100  # in a dictionary
KEEPALIVE, PING_TIMEOUT = 15, 20  # seconds without a word until a ping is sent, and until its answer is missed


def options() -> list[tuple[str, int]]:
    """Return gRPC's settings for both ends.

    Its pings are answered by the other end's library while Python trains (up to grpcio 1.70 that needs Python's lock
    now and then): both ends notice within KEEPALIVE + PING_TIMEOUT seconds that the other has vanished or is frozen.
    """
    return [
        ("grpc.max_receive_message_length", CHUNK),
        ("grpc.max_send_message_length", CHUNK),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE),
        ("grpc.keepalive_timeout_ms", 1000 * PING_TIMEOUT),
        ("grpc.http2.ping_timeout_ms", 1000 * PING_TIMEOUT),  # newer versions take the greater of the two
        ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        ("grpc.http2.min_ping_interval_without_data_ms", 500 * KEEPALIVE),  # or the server would take them for a flood
        ("grpc.http2.bdp_probe", 0),  # which would let 4 MB of a stream be sent that nobody has asked for
    ]


class Malformed(Exception):
    """What the other side says is no frame, or has a field that cannot be."""


class OtherVersion(Malformed):
    """The other side runs the version `version` of the suite, which does not go with this one."""

    def __init__(self, version: str):
        super().__init__(f"it runs FL-IoT {version}")
        self.version = version


def describe_versions(device: str, server: str) -> str:
    return f"this device runs FL-IoT {device}, the laptop {server}: make deploy"


def most_bytes(sizes: Iterable[int]) -> int:
    """Return the most bytes of a frame with arrays of these sizes: twice as many, and the header of each."""
    return FIRST + sum(2 * size + 256 for size in sizes)


def encode(kind: str, fields: dict | None = None, arrays: Iterable[bytes] = ()) -> bytes:
    """Return a frame. Raises TypeError if a field is not what JSON can hold; numpy's scalars are."""
    arrays = list(arrays)
    header = {**(fields or {}), "kind": kind, "arrays": list(map(len, arrays))}
    header = json.dumps(header, separators=(",", ":"), default=lambda value: value.item()).encode()
    length = LENGTHS.size + len(header) + sum(map(len, arrays))
    return b"".join([LENGTHS.pack(length, len(header)), header, *arrays])


def decode(frame: bytes) -> tuple[dict, list[bytes]]:
    """Return the header, whose fields `judge` checks, and the arrays. Raises Malformed."""
    try:
        length, end = LENGTHS.unpack_from(frame)
        end += LENGTHS.size
        header = json.loads(frame[LENGTHS.size : end].decode())
        sizes = header["arrays"]
        fits = end + sum(sizes) == length == len(frame) and all(type(size) is int and size >= 0 for size in sizes)
        if not fits or not isinstance(header["kind"], str):
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError, struct.error):
        raise Malformed("what it sends is no frame") from None
    arrays = []
    for size in sizes:
        arrays.append(frame[end : end + size])
        end += size
    return header, arrays


def split(frame: bytes) -> Iterator[bytes]:
    """Yield the messages of a frame."""
    for start in range(0, len(frame), CHUNK):
        yield frame[start : start + CHUNK]


def read(messages: Iterator[bytes], limit: int) -> bytes | None:
    """Return the next frame, of at most `limit` bytes, or None if the stream has ended. Raises Malformed."""
    parts, missing = [], None
    while missing != 0:
        part = next(messages, None)
        if part is None:
            return None
        if missing is None:
            missing = LENGTHS.unpack_from(part)[0] if len(part) >= LENGTHS.size else 0
            if missing > limit:
                raise Malformed(f"a frame of {missing} bytes, where {limit} are the most")
        if not part or len(part) != min(CHUNK, missing):
            raise Malformed("what it sends is no frame")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Which fields there may be: {name: function that tells whether a value is one}. Others are dropped.


def is_text(limit: int) -> Callable[[object], bool]:
    """One line of at most `limit` characters, which a terminal can show."""
    return lambda value: isinstance(value, str) and len(value) <= limit and value.isprintable()


def is_whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and low <= value <= high


def is_any_number(value: object) -> bool:
    """A number, finite or not: who takes it knows what it may be."""
    return isinstance(value, float) or is_whole(-(2**63), 2**63 - 1)(value)


def is_hex(value: object) -> bool:
    return isinstance(value, str) and len(value) in (32, 64) and not value.strip("0123456789abcdef")


def is_dict(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    def is_one(value):
        return (
            isinstance(value, dict)
            and len(value) <= ENTRIES
            and all(is_text(100)(name) and is_value(entry) for name, entry in value.items())
        )

    return is_one


def is_setting(value: object) -> bool:
    """What the server may say of a round besides its number."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, bool) or (is_any_number(value) and finite) or is_text(4096)(value)


def is_property(value: object) -> bool:
    """What a device may say of itself: text of any kind, which is printed by common/process.printable."""
    return isinstance(value, bool) or is_any_number(value) or (isinstance(value, str) and len(value) <= 1000)


def is_config(value: object) -> bool:
    rounds = is_whole(1, 10**9)
    return is_dict(is_setting)(value) and all(rounds(value.get(name, 1)) for name in ("round", "num_rounds"))


VERSIONS = {"version": is_text(20), "frames": is_whole(0, 10**6)}
QUESTIONS = {
    "hello": {"nonce": is_hex},
    "task": {"proof?": is_hex, "ticket": is_hex, "net": is_text(100), "dataset_id?": is_text(100)},
    "fit": {"config": is_config, "tensor_type": is_text(40)},
    "evaluate": {"config": is_config, "tensor_type": is_text(40)},
    "ping": {},
    "goodbye": {"proof?": is_hex, "why": is_text(20), "text?": is_text(1000)},
}
ANSWERS = {
    "hello": {"nonce": is_hex, "about": is_dict(is_property), "proof?": is_hex},
    "task": {"about": is_dict(is_property)},
    "fit": {"num_examples": is_any_number, "metrics": is_dict(is_property)},
    "evaluate": {"num_examples": is_any_number, "loss": is_any_number, "metrics": is_dict(is_property)},
    "ping": {},
    "goodbye": {},
}


def judge(header: dict, kinds: dict) -> dict:
    """Return the fields of a header, as `kinds` (QUESTIONS or ANSWERS) has them. Raises Malformed or OtherVersion."""
    if header["kind"] not in kinds:
        raise Malformed("what it sends is of no known kind")
    if header["kind"] == "hello":
        found = pick(header, VERSIONS)
        if found["frames"] != FRAMES or found["version"].split(".")[:2] != VERSION.split(".")[:2]:
            raise OtherVersion(found["version"])
    return pick(header, kinds[header["kind"]])


def pick(header: dict, fields: dict) -> dict:
    """Return those `fields` of a header; one whose name ends in ? may be missing. Raises Malformed for a wrong one."""
    found = {}
    for field, is_one in fields.items():
        name = field.rstrip("?")
        if name in header and is_one(header[name]):
            found[name] = header[name]
        elif name in header or not field.endswith("?"):
            raise Malformed(f"its {header['kind']} has no right {name}")
    return found
