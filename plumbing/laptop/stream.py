"""One device's stream of frames, as the server has it."""

import contextlib
import queue
import threading

from plumbing.common.frames import ANSWERS, FIRST, Malformed, OtherVersion, decode, encode, judge, read, split

import grpc

PATIENCE, GOODBYE = 10, 5  # seconds for a stranger to say who it is, and then to hear why it may not stay
LOST = "connection lost"  # the one reason of Gone that may pass by itself (rounds.lasting_reasons)


class Gone(Exception):
    """A stream has ended, or did not answer in time and was ended; the text says which."""


class Stream:
    """One device's stream, for one question at a time.

    context: gRPC's.
    leave: called without arguments when it needs no place among the strangers any more.
    channel: see proof.name_channel.
    """

    def __init__(self, context, leave, channel=""):
        self.context, self.leave, self.channel = context, leave, channel
        self.questions, self.answers = queue.SimpleQueue(), queue.SimpleQueue()
        self.traffic = 0, 0  # bytes of the last question and of its answer
        self.ended = threading.Event()
        self.on_end = lambda: None
        self.proof = {}  # the server's, to go with what it says once the device has given its own

    def ask(self, kind, fields=None, arrays=(), limit=FIRST, timeout=None):
        """Return the device's answer, (fields, arrays). Raise Gone or Malformed, after which the stream has ended.

        limit: bytes that the answer may have. timeout: seconds; None: as long as it takes.
        """
        if self.ended.is_set():
            raise Gone(LOST)
        question = encode(kind, fields, arrays)
        self.questions.put((question, limit))
        try:
            answer = self.answers.get(timeout=timeout)
            if answer is None:
                raise Gone(LOST)
            if isinstance(answer, Malformed):
                raise answer
            self.traffic = len(question), len(answer)
            header, arrays = decode(answer)
            if header["kind"] != kind:
                raise Malformed(f"it answers no {kind}")
            return judge(header, ANSWERS), arrays
        except queue.Empty:
            self.close()
            raise Gone(f"no answer within {timeout:g} s") from None
        except OtherVersion:  # which is told so
            raise
        except Malformed:
            self.close()
            raise

    def say_goodbye(self, why, text=""):
        """Tell the device why the stream ends, and end it: "turned_away", "stopped" or "over"."""
        with contextlib.suppress(Gone, Malformed):
            self.ask("goodbye", {**self.proof, "why": why, "text": text[:1000]}, timeout=GOODBYE)
        self.questions.put(None)

    def carry(self, messages):
        """Yield the messages of the questions; read each one's answer from the iterator `messages`."""
        try:
            for frame, limit in iter(self.questions.get, None):
                yield from split(frame)
                answer = read(messages, limit)
                self.answers.put(answer)
                if answer is None:
                    break
        except Malformed as error:
            self.answers.put(error)
        except grpc.RpcError:  # gRPC's way to say that the stream has ended
            pass
        finally:
            self.end()

    def close(self):
        """End the stream, whatever it is doing."""
        self.context.cancel()
        self.end()

    def end(self):
        """Be called when the stream has ended."""
        if not self.ended.is_set():
            self.ended.set()
            self.leave()
            self.on_end()
        self.answers.put(None)
        self.questions.put(None)
