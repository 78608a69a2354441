"""Train many clients on one machine, on Flower's simulation engine (Ray): the same code, without a device.

    make simulate NUM_CLIENTS=100
    make simulate NUM_CLIENTS=1000 NUM_ROUNDS=20 ARGS="--fraction_fit 0.1 --seed 1"
    .venv-simulation/bin/python deploy/simulate.py --num_clients 100 --num_rounds 5

Takes the flags of server.py that have an effect without a network. First splits the dataset into --num_clients shards
(default: 100), unless it is already; a dataset with bundles for devices is never split again. The images come from the
file or folder that SOURCE in the environment names, or from the source of the earlier split. Leaves the files that
server.py leaves. Ctrl-C ends it, with every process of Flower and Ray: finished rounds are saved, but the last pictures
are not drawn.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from libs import UserError, run_script, say  # noqa: E402
from plumbing.common.arguments import given_flags  # noqa: E402
from plumbing.common.process import printable  # noqa: E402

from check_simulation import known_flags, why_not  # noqa: E402

import server  # noqa: E402

TOOLS = Path(sys.executable).parent  # where flwr and flower-superlink are
MARK = f"FL_IOT_SIMULATION={os.getpid()}"  # in the environment of all that is started here, and so of what that starts
NOISE = re.compile(r"\x1b\[|Successfully installed|Using SuperLink|$")  # Flower's lines between ours
AS_BEFORE = ("fit", "partition", "sizes", "alpha", "eval_fraction", "test_fraction", "seed")  # in a new split
STARTS = 3  # Flower gives a run up that has not started within 30 s, as happens on a busy machine
NOT_STARTED = "No heartbeat received"
PATIENCE = 10  # seconds that Flower and Ray have to end by themselves
# For 2 cores as for 32: one thread a client, as many clients at a time as there are cores. Nothing phones home.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 without: they are what is to run here, and starve beside anything else
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or else it warns of what it will do in the future
    "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.05",  # of the memory: a model or two at a time pass through it
}


def parse_args():
    """The arguments, and those of them that a Flower App takes, as its run config."""
    problem, known = why_not(sys.argv[1:]), known_flags()
    if problem:
        raise UserError(problem)
    parser = server.make_parser(__doc__, known)
    args, given = parser.parse_args(), given_flags(parser)
    settings = {name: "off" if value is None else value for name, value in vars(args).items() if name in given}
    settings["round_timeout"] = "off"  # also where the run to go on from had one
    if isinstance(args.resume, str):
        settings["resume"] = str(Path(args.resume).absolute())  # the app runs in another folder
    return args, settings


def partition(dataset, num_clients):
    """Split the dataset into `num_clients` shards, otherwise as before, unless it is. Returns how many there are."""
    folder, settings = ROOT / "datasets" / dataset, {}
    if folder.is_dir():
        info = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if num_clients in (None, info["num_clients"]):
            return info["num_clients"]
        settings = {name: info.get(name) for name in AS_BEFORE}
        settings["image_size"] = "x".join(map(str, info["image_size"])) if "image_size" in info else None
        settings["source"] = info.get("source") if info.get("source") != "built in" else "Shapes10"
    if os.environ.get("SOURCE"):
        settings["source"] = os.environ["SOURCE"]
    num_clients = num_clients or 100
    command = [sys.executable, ROOT / "partition.py", "--dataset", dataset, "--num_clients", str(num_clients)]
    command += [f"--{name}={value}" for name, value in settings.items() if value is not None]
    code = subprocess.run(command).returncode
    if code != 0:
        raise SystemExit(code)
    return num_clients


def started(name=b""):
    """The PIDs of what was started from here and still runs, or of that with `name` in its command alone."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours to read
            marked = MARK.encode() in (folder / "environ").read_bytes().split(b"\0")
            if marked and name in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
    return pids


def end_all():
    """End all processes of Flower and Ray: what runs the simulation by a signal, which ends Ray too, then the rest.

    Flower itself does not: `flwr` only follows a run, and when the SuperLink ends, Ray goes on.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    until = time.monotonic() + PATIENCE
    send(signal.SIGINT, started(b"flwr-simulation"))
    while started(b"flwr-simulation") and time.monotonic() < until:
        time.sleep(0.1)
    while pids := started():
        send(signal.SIGKILL, pids)
        time.sleep(0.1)


def send(signum, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def flwr(env, *args):
    """What a command of flwr answers, which is asked for JSON."""
    command = [TOOLS / "flwr", *map(str, args), "--format", "json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    try:
        return json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        raise UserError(f"flwr {args[0]} failed: {printable(done.stdout + done.stderr, 500)}") from None


def start_superlink(home, env):
    """Start a SuperLink that no other run is on, and wait until it answers; `home` is its folder."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*sock.getsockname())
    (home / "config.toml").write_text(f'[superlink.simulation]\naddress = "{address}"\ninsecure = true\n')
    command = [TOOLS / "flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
    command += ["--port", address.split(":")[1], "--disable-runtime-dependency-installation"]
    with open(home / "superlink.log", "w") as log:
        superlink = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and superlink.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health", timeout=5):
            return
        time.sleep(0.2)
    raise UserError(f"flower-superlink does not start: {printable((home / 'superlink.log').read_text()[-500:], 500)}")


def follow(run_id, env, verbose):
    """Show the lines of the run until it ends, only ours unless `verbose`. Returns its entry in Flower's list."""
    command = [TOOLS / "flwr", "log", run_id, "simulation", "--stream"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as log:
        for line in log.stdout:
            if verbose or not NOISE.match(line):
                say(line.rstrip(), sys.stderr if line.startswith("server.py:") else None)
    return flwr(env, "list", "simulation", "--run-id", run_id)["runs"][0]


def main():
    args, settings = parse_args()
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray is missing here: make .venv-simulation/setup, and .venv-simulation/bin/python for this")
    num_clients = settings["num_clients"] = partition(args.dataset, args.num_clients)
    settings["folder"] = str(ROOT)
    home = Path(tempfile.mkdtemp(prefix="fl-iot-simulation-"))
    env = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    env.update([MARK.split("=")])
    env.pop("RAY_ADDRESS", None)  # of a cluster of the user's, which takes other settings
    try:
        start_superlink(home, env)
        (home / "run.toml").write_text("".join(f"{name} = {json.dumps(settings[name])}\n" for name in settings))
        machine = f"num-supernodes={num_clients} client-resources-num-cpus=1 init-args-num-cpus={os.cpu_count()} "
        machine += "init-args-log-to-driver=false init-args-logging-level='ERROR'"
        command = ["run", ROOT, "simulation", "--run-config", home / "run.toml", "--federation-config", machine]
        for _ in range(STARTS):
            run = follow(flwr(env, *command)["run-id"], env, args.verbose)
            if run["running-at"] != "N/A" or NOT_STARTED not in run["status-details"]:
                break
    finally:
        end_all()
        shutil.rmtree(home, ignore_errors=True)
    if run["status"] == "finished:completed":
        return 0
    known = re.search(r"exit code (\d+)", run["status-details"])  # server.run_app's, which has said why
    if known is None:
        say(f"simulate.py: {run['status']}: {printable(run['status-details'])}", sys.stderr)
    return int(known[1]) if known else 1


if __name__ == "__main__":
    run_script(main)
