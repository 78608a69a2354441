"""What the two ends say to each other, without a network: a rogue on either end, other versions, a relay, nonsense."""

import contextlib
import json
import random
import struct
import sys

from libs import np
from plumbing import VERSION
from plumbing.common import frames, proof
from plumbing.common.frames import Malformed, decode, encode
from plumbing.common.process import UserError
from plumbing.common.wire import Sender
from plumbing.device.connection import Connection, Session
from plumbing.laptop.checks import Checks, Rejected
from plumbing.laptop.handshake import TurnedAway, make_ready, meet
from plumbing.laptop.remote import ClientFailure, RemoteClient
from plumbing.laptop.stream import Gone, Stream

import pytest
from flwr.client import NumPyClient
from flwr.common import EvaluateIns, FitIns, ndarrays_to_parameters

from nets import LeNet5

SECRET = b"tell nobody, not even me"
ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.int64(4)]
FIGURES = {"fit_loss": 1.0, "fit_accuracy": 0.5, "eval_loss": 1.0, "eval_accuracy": 0.5}
TASK = {"dataset": "Tiny", "dataset_id": "a1", "channels": 3, "num_classes": 10, "net": "LeNet5", "fingerprint": "f1"}
TASK["trial"] = np.array([[7, 1, -2, 3], [np.nan, 1, -2, 3]], np.float32)
READY = {"channels": 3, "num_classes": 10, "dataset_id": "a1", "num_fit": 8, "num_eval": 2, "fingerprint": "f1"}


class Device(NumPyClient):
    """A client that counts what it is asked to do."""

    def __init__(self, secret=None):
        self.secret, self.task, self.trained = secret, self, 0
        self.model = LeNet5(3, 10)
        self.who = {"cid": 1, "dataset": "Tiny", "device_id": "d", "version": VERSION, "board": "a Pi"}

    def get_properties(self, config):
        return {**self.who, **READY, "trial": TASK["trial"].tobytes()} if "net" in config else self.who

    def get_parameters(self, config):
        return ARRAYS

    def fit(self, parameters, config):
        self.trained += 1
        return parameters, 8, dict(FIGURES)

    def evaluate(self, parameters, config):
        self.trained += 1
        return 1.0, 2, {"global_eval_loss": 1.0, "global_eval_accuracy": 0.5}


class Line(Stream):
    """A server's stream to whom `answer(frame)` answers: gRPC is left out."""

    def __init__(self, answer, channel=""):
        super().__init__(self, lambda: None, channel)
        self.answer, self.questions = answer, self

    def put(self, question):  # into the queue of the questions
        if question is not None:
            frame, limit = question
            try:
                self.answers.put(frames.read(frames.split(self.answer(frame)), limit))
            except Malformed as error:
                self.answers.put(error)

    def cancel(self):  # of gRPC's context
        pass


def shake_hands(line, secret=SECRET):
    return make_ready(line, meet(line, 4, TASK, secret), TASK, "0" * 64)


# ---------------------------------------------------------------------------------------------------------------------
# The proofs.


def test_both_prove_that_they_know_the_secret_and_then_train():
    device = Device(SECRET)
    session = Session(device)
    client = RemoteClient(Line(session.answer), shake_hands(Line(session.answer)), Sender())
    assert client.properties["board"] == "a Pi" and client.properties["num_fit"] == 8
    assert session.proved and session.ticket == "0" * 64 and device.trained == 0
    res = client.ask("fit", FitIns(ndarrays_to_parameters(ARRAYS), {"round": 1, "lr": 0.5}), None)
    assert (res.num_examples, device.trained) == (8, 1) and res.metrics.items() >= FIGURES.items()
    assert res.parameters == ndarrays_to_parameters(ARRAYS)
    assert client.ask("evaluate", EvaluateIns(res.parameters, {}), None).loss == 1.0


def test_relay_between_two_channels_fails_and_on_one_it_does_not():
    """What a device proves over TLS, or without it, is good for no connection of another kind."""
    tls = proof.name_channel(b"-----BEGIN CERTIFICATE-----\nMIIB\n")
    assert tls == proof.name_channel(b"-----BEGIN CERTIFICATE-----\r\nMIIB\r\n") != proof.name_channel(b"other")
    for victim, server in ((tls, ""), ("", tls), (proof.name_channel(b"other"), tls)):
        with pytest.raises(TurnedAway, match="its secret is not the server's, or its --root_certificate"):
            shake_hands(Line(Session(Device(SECRET), victim).answer, server))
    assert shake_hands(Line(Session(Device(SECRET), tls).answer, tls))["cid"] == 1


def test_proof_of_a_server_on_another_channel_is_none():
    tls, session = proof.name_channel(b"ours"), Session(Device(SECRET), proof.name_channel(b"ours"))
    session.answer(encode("hello", {"version": VERSION, "frames": frames.FRAMES, "nonce": "0" * 32}))
    for channel, is_right in (("", False), (proof.name_channel(b"other"), False), (tls, True)):
        theirs = proof.prove_server(SECRET, channel, session.nonces)
        question = encode("task", {"net": "LeNet5", "ticket": "0" * 64, "proof": theirs})
        with contextlib.nullcontext() if is_right else pytest.raises(Malformed, match="does not prove"):
            session.answer(question)
    assert session.proved


@pytest.mark.parametrize("field, value", [("cid", 2), ("dataset", "Tiny2"), ("more", 1)])
def test_what_a_device_says_of_itself_cannot_be_changed_on_the_way(field, value):
    session = Session(Device(SECRET))

    def meddle(frame):
        header, _ = decode(session.answer(frame))
        header["about"][field] = value
        return encode(header["kind"], header)

    with pytest.raises(TurnedAway, match="its secret is not the server's"):
        meet(Line(meddle), 4, TASK, SECRET)


@pytest.mark.parametrize("question", [
    encode("task", {"net": "LeNet5", "ticket": "0" * 64, "proof": "0" * 64}),
    encode("fit", {"config": {}, "tensor_type": "off 0"}), encode("evaluate", {"config": {}, "tensor_type": "off 0"}),
    encode("ping"),
])  # fmt: skip
def test_device_answers_nothing_to_a_server_that_has_not_proved_that_it_knows_the_secret(question):
    device = Device(SECRET)
    session = Session(device)
    for _ in range(2):  # before and after the hello
        with pytest.raises(Malformed):
            session.answer(question)
        if session.nonces is None:
            answer, _ = decode(session.answer(encode("hello", hello())))
            assert set(answer["about"]) == {"cid", "dataset", "device_id", "version"}
    assert device.trained == 0 and session.ticket is None


@pytest.mark.parametrize("why", ["over", "stopped", "turned_away"])
def test_device_obeys_no_notice_of_such_a_server_and_says_what_it_heard(why):
    session = Session(Device(SECRET))
    session.answer(encode("hello", hello()))
    session.answer(encode("goodbye", {"why": why, "text": "go away"}))
    end = Connection(session.client, "127.0.0.1", 1).judge_end(session, "lost")
    assert end == "the server at 127.0.0.1:1 does not prove that it knows the secret (it says: go away)"


# ---------------------------------------------------------------------------------------------------------------------
# Versions.


def hello(**fields):
    return {"version": VERSION, "frames": frames.FRAMES, "nonce": "1" * 32, **fields}


@pytest.mark.parametrize(
    "other", [{"version": "9.0.0"}, {"frames": frames.FRAMES + 1}, {"version": "0.9", "frames": 7, "about": 7}]
)
def test_other_versions_are_turned_away_in_words_on_both_sides(other):
    version = other.get("version", VERSION)
    with pytest.raises(TurnedAway, match=f"^this device runs FL-IoT {version}, the laptop {VERSION}: make deploy$"):
        meet(Line(lambda frame: encode("hello", {**hello(), **other})), 4, TASK)
    session = Session(Device())
    answer, _ = decode(session.answer(encode("hello", hello(**other))))
    assert answer["version"] == VERSION
    with pytest.raises(UserError, match=f"this device runs FL-IoT {VERSION}, the laptop {version}: make deploy"):
        Connection(session.client, "127.0.0.1", 1).judge_end(session, "lost")


# ---------------------------------------------------------------------------------------------------------------------
# Nonsense: 10,000 frames for each that may hear it.

COUNT = 10_000
VALUES = [
    *(None, True, 0, -1, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "\x1b[2J", "x" * 5000, "\n", [], {}),
    *({"round": "1"}, {"round": 10**10}, {"lr": float("nan")}, {"a": {"b": []}}, {str(n): n for n in range(200)}),
    *(["x"] * 50, {"\x1b": 1}, "0" * 64, [-1, 1], [10**18], {"fedbn": "B" * 10**5}, {"save_ckp_path": "/tmp/owned"}),
]
TENSORS = [
    b"",
    b"fp16\x01",
    b"int8\x01" + b"\0" * 20,
    b"\x80\x04cos\nsystem\n(S'x'\ntR.",
    b"\x93NUMPY\x01\0\xff\xff{",
    b"x",
]

NAMES = ["cid", "round", "lr", "fedbn", "net", "x"]


def mutate(rng, frame):
    """A frame like `frame`, but wrong: other fields, other arrays, other bytes."""
    header, arrays = decode(frame)
    way = rng.randrange(6)
    if way == 0:
        header[rng.choice([*header, "more", "config", "about", "metrics"])] = rng.choice(VALUES)
    elif way == 1:
        name = rng.choice([name for name in header if isinstance(header[name], dict)] or ["about"])
        header[name] = {**header.get(name, {}), rng.choice(NAMES): rng.choice(VALUES)}
    elif way == 2:
        header["kind"] = rng.choice([*frames.QUESTIONS, "on_fit", "__class__"])
    elif way == 3:
        arrays = rng.choices([*TENSORS, *arrays], k=rng.randrange(5))
    elif way == 4:
        text = rng.choice([b"[" * 10_000, b"{}", b"nonsense", b"\xff", b'{"kind": 1, "arrays": []}', b"1" * 5000])
        return frames.LENGTHS.pack(12 + len(text), len(text)) + text
    else:
        frame = bytearray(frame)
        for _ in range(rng.randrange(1, 9)):
            frame[rng.randrange(len(frame))] = rng.randrange(256)
        return bytes(frame[: rng.choice([len(frame), rng.randrange(len(frame))])]) or b"\0"
    kind = header.pop("kind")
    try:
        sizes = header.pop("arrays")
        frame = encode(kind, header, arrays)
        return frame if sizes in ([], list(map(len, arrays))) or way == 3 else encode(kind, {**header, "arrays": sizes})
    except (ValueError, TypeError, AttributeError):
        return frame


def answers_of(device):
    """The right answers of a device: {kind: frame}."""
    session, heard = Session(device), {}

    def answer(frame):
        heard[decode(frame)[0]["kind"]] = session.answer(frame)
        return heard[decode(frame)[0]["kind"]]

    client = RemoteClient(Line(answer), shake_hands(Line(answer), None), Sender())
    client.ask("fit", FitIns(ndarrays_to_parameters(ARRAYS), {"round": 1}), None)
    client.ask("evaluate", EvaluateIns(ndarrays_to_parameters(ARRAYS), {}), None)
    client.is_alive()
    return heard


def test_server_takes_no_harm_from_strangers():
    rng, right, counts = random.Random(0), answers_of(Device()), dict.fromkeys(["in", "out"], 0)
    for _ in range(COUNT):
        wrong = {kind: mutate(rng, frame) if rng.random() < 0.7 else frame for kind, frame in right.items()}
        line = Line(lambda frame, wrong=wrong: wrong.get(decode(frame)[0]["kind"], b""))
        secret = rng.choice([SECRET, None])
        try:
            client = shake_hands(line, secret)
            assert secret is None and client["cid"] in range(4)
            counts["in"] += 1
        except TurnedAway as reason:
            counts["out"] += 1
            assert len(reason.cid) <= 20 and reason.cid.isprintable() and str(reason).isprintable()
        except (Gone, Malformed) as error:
            counts["out"] += 1
            assert str(error).isprintable()
    assert min(counts.values()) > 500


def test_server_takes_no_harm_from_devices_that_were_let_in(capsys):
    rng, right, counts = random.Random(0), answers_of(Device()), dict.fromkeys(["kept", "dropped"], 0)
    net = LeNet5(3, 10)
    checks, parameters = Checks(net, 32), ndarrays_to_parameters(ARRAYS)
    for _ in range(COUNT):
        client = RemoteClient(None, {"cid": 1, "num_fit": 8}, Sender(rng.choice(["off", "fp16"]), [True, False]))
        kind = rng.choice(["fit", "evaluate"])
        client.proxy = Line(lambda frame, kind=kind: mutate(rng, right[kind]))
        ins = (FitIns if kind == "fit" else EvaluateIns)(parameters, {})
        try:
            res = client.ask(kind, ins, None)
            with contextlib.suppress(Rejected):
                getattr(checks, f"check_{kind}")(client, res)
            counts["kept"] += 1
        except ClientFailure as failure:
            counts["dropped"] += 1
            assert str(failure).isprintable()
        assert client.lock.acquire(blocking=False)
    assert min(counts.values()) > 500 and capsys.readouterr().err == ""


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "secret"])
def test_device_takes_no_harm_from_a_rogue_server(secret, capsys):
    rng, device, counts = random.Random(0), Device(secret), dict.fromkeys(["answered", "ended"], 0)
    sender = Sender()
    model = sender.model_of(ndarrays_to_parameters(ARRAYS))
    sent = sender.pack(model, None)
    settings = {"round": 1, "num_rounds": 2, "lr": 1e-3}
    right = [
        encode("hello", hello()),
        encode("task", {"net": "LeNet5", "dataset_id": "a1", "ticket": "0" * 64, "proof": "1" * 64}),
        encode("fit", {"config": settings, "tensor_type": sent.tensor_type}, sent.tensors),
        encode("evaluate", {"config": {}, "tensor_type": f"int8 {model.name}"}, sent.tensors),
        encode("ping"),
        encode("goodbye", {"why": "over", "text": "x"}),
    ]
    session = Session(device)
    for turn in range(COUNT):
        frame = rng.choice(right)
        frame = mutate(rng, frame) if rng.random() < 0.6 else frame
        try:
            frame = frames.read(frames.split(frame), session.limit)
            assert frame is None or frames.read(frames.split(session.answer(frame)), 10**6)
            counts["answered"] += 1
        except Malformed as error:
            counts["ended"] += 1
            assert len(str(error)) < 200
            session = Session(device)
            if turn % 2:
                session.answer(right[0])
    assert min(counts.values()) > 500 and (device.trained == 0) is (secret is not None)
    out = capsys.readouterr()
    assert set(out.out.splitlines()) <= {"connected to the server"} and out.err == ""


def test_nothing_is_allocated_by_a_length_that_a_stranger_names():
    """A frame that says it has 60,000 bytes and never sends them; messages that go beyond it, or are empty."""
    for parts in (
        [struct.pack("<QI", 2**40, 9)],
        [struct.pack("<QI", frames.FIRST + 1, 9)],
        [struct.pack("<QI", 60_000, 9)],
        [b""],
        [bytes(11)],
        [encode("ping") + b"x"],
    ):
        with pytest.raises(Malformed):
            frames.read(iter(parts), frames.FIRST)
    long = encode("fit", {}, [bytes(3 * frames.CHUNK)])
    parts = list(frames.split(long))
    assert len(parts) == 4 and frames.read(iter(parts), len(long)) == long
    assert frames.read(iter(parts[:2]), len(long)) is None  # the stream has ended in the middle
    with pytest.raises(Malformed):
        frames.read(iter(parts), len(long) - 1)


@pytest.mark.parametrize("config, kept", [
    ({"round": 3, "num_rounds": 9, "lr": 1e-3, "augment": True, "fedbn": "ab cd", "seed": 7}, True),
    ({"round": "3"}, False), ({"round": True}, False), ({"round": 0}, False), ({"num_rounds": 2**40}, False),
    ({"lr": float("nan")}, False), ({"fedbn": "\x1b[2J"}, False), ({"fedbn": "x" * 5000}, False), ({"a\n": 1}, False),
    ({"more": None}, False), ({"more": []}, False), ({"more": 2**64}, False),
])  # fmt: skip
def test_settings_of_a_round_are_judged(config, kept):
    assert frames.is_config(config) is kept


def test_frame_is_what_its_description_says():
    frame = encode("fit", {"metrics": {"x": np.float32(0.5)}, "num_examples": np.int64(3)}, [b"one", b"", b"three"])
    length, header = struct.unpack_from("<QI", frame)
    assert length == len(frame) and frame[12 + header :] == b"onethree"
    assert json.loads(frame[12 : 12 + header]) == {
        **{"kind": "fit", "arrays": [3, 0, 5]}, **{"metrics": {"x": 0.5}, "num_examples": 3},
    }  # fmt: skip
    assert decode(frame)[1] == [b"one", b"", b"three"] and sys.getsizeof(frame) < 200
