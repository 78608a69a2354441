"""A fork server: the suite's scripts start in a tenth of a second, forked from a process that has imported packages.

    python tests/forks.py FD

This is that process; Forked asks for others. FD is a Unix socket, each message on which asks for one process: as JSON
its `argv` (a script, or `-c` and code, with arguments), `cwd` and `env`. With it come four descriptors: stdin, stdout
and stderr of the new process, and a socket that is told its PID and, when it has ended, its exit code. Only third-party
packages are imported before the fork: the suite's own modules are read by each process, as `python SCRIPT` does it.
When the other end of FD is closed, all processes are killed.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import weakref

# With what flwr and wandb import only when they are used: the public API of wandb alone takes a second.
PACKAGES = (
    *("cv2", "filelock", "flwr.client", "flwr.server", "grpc", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "numpy", "pandas", "PIL.PngImagePlugin", "requests", "torch", "tqdm"),
    *("wandb.cli.cli", "wandb.sdk.launch", "yaml"),
)
MESSAGE = 1 << 18  # bytes that a request may have
HEEDED = {signal.SIGINT, signal.SIGTERM}


def at_import(env):
    """The environment without what packages only read when they are used: the rest has to be that of the server."""
    return {
        name: env[name] for name in env if not name.startswith(("WANDB_", "PYTEST_")) and name not in ("HOME", "NETRC")
    }


class Forked:
    """A process that the fork server has forked, with what tests need of a subprocess.Popen."""

    def __init__(self, command, files, env, cwd):
        self.args, self.returncode = command, None
        self.told, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps({"argv": list(map(str, command[1:])), "cwd": cwd, "env": env}).encode()
        with theirs:
            fds = [*(file.fileno() for file in files), theirs.fileno()]
            socket.send_fds(start_server(tuple(sorted(at_import(env).items()))), [request], fds)
        self.pid = int(self.told.recv(64))

    def wait(self, timeout=None):
        if self.returncode is None:
            self.told.settimeout(timeout)
            try:
                self.returncode = int(self.told.recv(64))
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.told.close()
        return self.returncode

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended at this very moment
                os.kill(self.pid, signum)


@functools.cache
def start_server(env):
    """Start the fork server of this process, if it does not run: the socket for requests."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fd = theirs.fileno()
        command = [sys.executable, __file__, str(fd)]
        server = subprocess.Popen(
            command, pass_fds=[fd], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=dict(env)
        )
    atexit.register(server.wait)
    atexit.register(ours.close)
    return ours


# ---------------------------------------------------------------------------------------------------------------------
# The server.


def import_packages():
    """Import what takes a script its time to start, with the settings that libs.py has for it."""
    os.environ.update(FLWR_TELEMETRY_ENABLED="0", GRPC_VERBOSITY="NONE")
    os.environ.update(OPENCV_LOG_LEVEL="SILENT", GRPC_DNS_RESOLVER="native")
    for name in PACKAGES:
        with contextlib.suppress(ImportError):  # what is missing, the process that needs it says
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1  # for a fork has no thread but the one that forks


def serve(control):
    """Fork for each request, and tell what becomes of each process; returns in each new process, with its request."""
    running, poll = {}, select.poll()  # {pidfd: (pid, socket that is told)}
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd != control.fileno():
                poll.unregister(fd)
                os.close(fd)
                pid, told = running.pop(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with told, contextlib.suppress(OSError):  # nobody may want to know any longer
                    told.send(str(code).encode())
                continue
            message, fds, _, _ = socket.recv_fds(control, MESSAGE, 4)
            if not message:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)  # until the new process has its own handlers
            pid = os.fork()
            if pid == 0:
                for sock in (control, *(told for _, told in running.values())):
                    sock.detach()
                become_new(fds)
                return json.loads(message)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
            for number in fds[:3]:
                os.close(number)
            pidfd, told = os.pidfd_open(pid), socket.socket(fileno=fds[3])
            running[pidfd] = pid, told
            poll.register(pidfd, select.POLLIN)
            with contextlib.suppress(OSError):
                told.send(str(pid).encode())


def become_new(fds):
    """Have the streams `fds` and no other descriptor, and the signal handlers of a new Python."""
    for number in range(3):
        os.dup2(fds[number], number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)


def run(argv, cwd, env):
    """Do what `python ARGV` does, up to its exit code; only what it takes Python to clear its memory is spared."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.modules["numpy"].random.seed()  # Python seeds its own generator at a fork
    sys.modules["torch"].default_generator.seed()
    for finalizer in list(weakref.finalize._registry):  # wandb makes folders when it is imported: each process its own
        directory = finalizer.peek()[0]
        if isinstance(directory, tempfile.TemporaryDirectory):
            finalizer.detach()
            directory.__init__()
    main = types.ModuleType("__main__")
    sys.orig_argv[1:], sys.modules["__main__"] = argv, main
    if argv[0] == "-c":
        sys.argv[:], sys.path[0], name, source = ["-c", *argv[2:]], "", "<string>", argv[1]
    else:
        sys.argv[:], sys.path[0], name = argv, os.path.dirname(argv[0]), argv[0]
        main.__file__ = name
        with open(name, "rb") as file:
            source = file.read()
    code = 0
    try:
        exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        error = error.with_traceback(error.__traceback__.tb_next)  # without this frame
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then closes the socket
    import_packages()
    gc.collect()
    gc.freeze()
    run(**serve(socket.socket(fileno=int(sys.argv[1]))))
