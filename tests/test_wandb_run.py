"""Weights & Biases: online, offline, resumed and cut off, with wandb's own client against a small server on 127.0.0.1.

Nothing is read from or written to the real home; every script that might ask for a key runs on a terminal at which
nobody types.
"""

import base64
import http.server
import io
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from helpers import Suite, as_logged, free_port, history, start_patched, wait_until, wandb_records
from helpers import wandb_history as inspect
from test_record import KILL, ROUND_3

KEY = "0123456789abcdef" * 3  # the one key that the server knows
WANDB = str(Path(sys.executable).with_name("wandb"))

ON_TERMINAL = """
import contextlib, os, pty, signal, sys, threading, time
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])

def copy():
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(terminal, 1024):
            os.write(1, data)

threading.Thread(target=copy, daemon=True).start()
signal.signal(signal.SIGINT, lambda signum, frame: os.write(terminal, b"\\3"))  # Ctrl-C, typed at this terminal
status = os.waitpid(pid, 0)[1]
time.sleep(0.2)  # for the last words; wandb's processes may hold the terminal open a while longer
os._exit(os.waitstatus_to_exitcode(status))
"""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of wandb's client: GraphQL, file_stream, and uploads of files."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        stub, body = self.server.stub, self.rfile.read(int(self.headers["Content-Length"]))
        graphql = json.loads(body) if self.path == "/graphql" else {}
        named = re.search(r"(?:query|mutation) (\w+)", graphql.get("query", ""))
        operation = named[1] if named else self.path
        stub.requests.append(operation)
        if stub.silent == "always" or (stub.silent and operation != "Viewer"):
            stub.closed.wait()
        if stub.closed.is_set():
            self.close_connection = True
            return
        if self.command == "PUT":
            stub.uploads[self.path] = body
            return self.reply(200, {})
        if self.headers["Authorization"] != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
            return self.reply(401, {"errors": [{"message": "invalid API key"}]})
        if self.path == "/graphql":
            return self.reply(200, {"data": getattr(stub, operation, dict)(**(graphql.get("variables") or {}))})
        entity, project, run_id = re.fullmatch(r"/files/(.+)/(.+)/(.+)/file_stream", self.path).groups()
        assert (entity, project) == ("lab", stub.runs[run_id]["project"])
        stub.take_in(stub.runs[run_id], json.loads(body))
        self.reply(200, {"exitcode": None, "limits": {}})

    do_PUT = do_POST

    def reply(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Http(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # a client that hangs up is nothing to us
            self.stub.errors.append(repr(sys.exception()))


class Stub:
    """What wandb's server does for a run. Its answers are the methods named like wandb's queries.

    `silent` is "always" to accept connections and never answer, or "after login" to answer that much. With `before`,
    a Stub that is closed, it is that one again, on the same port and with all that it knew.
    """

    def __init__(self, silent=None, before=None):
        self.silent, self.closed = silent, threading.Event()
        self.requests, self.errors, self.runs = [], [], {} if before is None else before.runs
        self.alerts, self.artifacts, self.uploads = [], {}, {}  # artifacts by id, uploads by the path of their address
        self.http = Http(("127.0.0.1", 0 if before is None else before.http.server_address[1]), Handler)
        self.http.stub = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self):
        """Be gone: refuse new connections and drop the open ones."""
        self.closed.set()
        self.http.shutdown()
        self.http.socket.close()

    def Viewer(self):
        teams = {"edges": [{"node": {"name": "lab"}}]}
        user = {"id": "user", "entity": "lab", "username": "ada", "email": "ada@example.org", "flags": "{}"}
        return {"viewer": {**user, "teams": teams}}

    def RunResumeStatus(self, name, project, entity):
        run = self.runs.get(name)
        return {"model": {"id": project, "name": project, "entity": {"id": "1", "name": "lab"}, "bucket": run and {
            **self.bucket(name),
            "summaryMetrics": json.dumps(run["summary"]),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(run["history"][line]) for line in sorted(run["history"])[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {"1": []}}),  # wandb resumes no run without it
        }}}  # fmt: skip

    def UpsertBucket(self, name, project, config, displayName, **_):
        new = {"project": project, "display_name": displayName, "at_start": [], "history": {}, "summary": {}}
        known = name in self.runs
        run = self.runs.setdefault(name, new)
        run.update(config=json.loads(config or "{}"), complete=False)
        if displayName is not None:  # the first of a process
            run["at_start"].append(len(run["history"]))
        return {"upsertBucket": {"bucket": self.bucket(name), "inserted": not known}}

    def CreateRunFiles(self, run, files, **_):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def NotifyScriptableRunAlert(self, **alert):
        self.alerts.append(alert)
        return {"notifyScriptableRunAlert": {"success": True}}

    def ArtifactType(self, **_):
        return {"project": None}  # none of that name yet

    def ServerFeaturesQuery(self):
        return {"serverInfo": {"features": []}}

    def CreateArtifact(self, input):
        new = {"id": f"artifact-{len(self.artifacts)}", "state": "PENDING"}
        self.artifacts[new["id"]] = {**input, "committed": False}
        return {"createArtifact": {"artifact": {**new, "artifactSequence": {"latestArtifact": None}}}}

    def CreateArtifactManifest(self, artifactID, **_):
        file = {"id": "file", "uploadUrl": f"{self.url}/manifests/{artifactID}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def CreateArtifactFiles(self, input):
        nodes = [
            {
                "storagePath": f"{file['artifactID']}/{file['name']}",
                "uploadUrl": f"{self.url}/artifacts/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in input["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def CommitArtifact(self, artifactID):
        self.artifacts[artifactID]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": self.artifacts[artifactID]["digest"]}}}

    def bucket(self, run_id):
        run = self.runs[run_id]
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run["display_name"],
            "description": None,
            "config": json.dumps(run["config"]),
            "sweepName": None,
            "project": {"id": "2", "name": run["project"], "entity": {"id": "1", "name": "lab"}},
            "historyLineCount": len(run["history"]),
        }

    def take_in(self, run, stream):
        """Take in what file_stream brings: lines of history by their offset, as the real one does."""
        files = stream.get("files", {})
        new = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        run["history"].update(enumerate(map(json.loads, new["content"]), new["offset"]))
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"].update(json.loads(line))
        run["complete"] = stream.get("complete", run["complete"])


@pytest.fixture(scope="module")
def stubs():
    """A function that starts a Stub, which is gone at the end of the module."""
    started = []

    def start(*args):
        started.append(Stub(*args))
        return started[-1]

    yield start
    for stub in started:
        stub.close()
    assert [error for stub in started for error in stub.errors] == []


@pytest.fixture(scope="module")
def laptops(tmp_path_factory, three_shards):
    """A function that gives a suite with the dataset Tiny, a home of its own, and WANDB_* as given, else unset."""
    suites = []

    def new(stub=None, key=None, **env):
        suite = Suite(tmp_path_factory.mktemp("laptop"))
        suites.append(suite)
        (suite.root / "datasets").symlink_to(three_shards)
        (suite.root / "home").mkdir()
        del suite.env["WANDB_MODE"]
        suite.env.pop("NETRC", None)
        suite.env.update(HOME=str(suite.root / "home"), **env)
        suite.stub = stub
        if stub is not None:
            suite.env["WANDB_BASE_URL"] = stub if isinstance(stub, str) else stub.url
        if key is not None:
            suite.env["WANDB_API_KEY"] = key
        return suite

    yield new
    for suite in suites:
        suite.close()


def on_terminal(suite, *command):
    """Start Python with `command` on a terminal at which nobody types; stdout and stderr both go to `out`."""
    return suite.start("-c", ON_TERMINAL, sys.executable, *command)


def start_curves(suite):
    """Start what server.py does for wandb, without the training: start_wandb, a step, the end."""
    code = f"import sys, time; sys.path.insert(0, {str(suite.root)!r})\n"
    code += "from plumbing.laptop.wandb_run import start_wandb\nbegan = time.monotonic()\n"
    code += "run, where = start_wandb('Tiny', None, {'lr': 0.1}); print(where)\n"
    code += "run.log_round({'round': 1, 'fit_loss': 0.5}, {}); run.finish(); print('took', time.monotonic() - began)"
    return on_terminal(suite, "-c", code)


def start_training(suite, num_rounds, *args):
    return suite.server("--dataset", "Tiny", "--num_clients", 2, "--num_rounds", num_rounds, *args)


def start_clients(suite):
    return [suite.client(cid, "--dataset", "Tiny") for cid in range(2)]


def folder_to_send(process):
    """The folder that a server's line on sending curves later names."""
    return Path(re.search(r"send them later with: \S*wandb sync .*?(/\S+)", process.out)[1])


def send_later(suite, process, stub):
    """Do what that line says, with a key and the stub at hand now."""
    line = re.search(r"send them later with: \S*wandb (sync .+)", process.out)[1]
    env = {**suite.env, "WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY}
    subprocess.run([WANDB, *line.split()], env=env, cwd=suite.root, stdin=subprocess.DEVNULL, check=True, timeout=60)


def assert_same_curves(steps, rows):
    """`steps` that wandb has are the `rows` of history.csv, each under its round, with every device's own figures.

    What a round cut short could not measure is blank in the one and missing in the other.
    """
    steps, rows = pd.DataFrame(steps), as_logged(rows)
    assert list(steps["_step"]) == list(steps["round"]) == list(rows["round"])
    for name in rows.columns[1:]:
        assert list(steps[name]) == pytest.approx(list(rows[name]), nan_ok=True), name
    for name in ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy", "global_eval_loss", "global_eval_accuracy"):
        means = (steps[f"clients/0/{name}"] + steps[f"clients/1/{name}"]) / 2  # the shards are of one size
        assert list(means) == pytest.approx(list(rows[name]), rel=1e-5, nan_ok=True), name  # of six digits


def assert_sent(run, rows):
    """What the stub has of a run is all that history.csv has: no step is missing, doubled or under another round."""
    assert (run["project"], run["display_name"]) == ("FL-IoT", "Tiny")
    assert run["config"]["lr"]["value"] == 1e-3 and run["config"]["num_clients"]["value"] == 2
    assert run["complete"]
    assert_same_curves([line for _, line in sorted(run["history"].items())], rows)


def assert_models_sent(suite, run_id):
    """Only the best and the last model went to the stub, at each of the run's two ends; the last are those in ckps/."""
    artifacts = {name: one for name, one in suite.stub.artifacts.items() if one["artifactTypeName"] == "model"}
    assert 2 <= len(artifacts) <= 4 and all(one["committed"] for one in artifacts.values())
    assert {one["artifactCollectionName"] for one in artifacts.values()} == {f"Tiny-{run_id}"}
    holders = {}  # of each alias: who got it last
    for name, one in artifacts.items():
        holders.update({alias["alias"]: name for alias in one["aliases"]})
    assert set(holders) == {"latest", "best"}
    for alias, file in (("best", "best.ptl"), ("latest", "server.ptl")):
        sent = torch.load(io.BytesIO(suite.stub.uploads[f"/artifacts/{holders[alias]}/model.ptl"]), weights_only=True)
        kept = torch.load(suite.ckps("Tiny") / file, weights_only=True)
        assert sent["round"] == kept["round"] == json.loads(artifacts[holders[alias]]["metadata"])["round"]
        assert all(torch.equal(tensor, kept["model"][name]) for name, tensor in sent["model"].items())


def stop_and_resume(suite):
    """Train, stop after three rounds or a few more, resume, train three more: both servers, the rows at the stop."""
    stopped = start_training(suite, 10_000)
    clients = start_clients(suite)
    stopped.wait_for("round 3/", timeout=90)
    stopped.send(signal.SIGTERM)
    assert stopped.wait() == 143, stopped
    rows = history(suite)
    resumed = start_training(suite, len(rows) + 3, "--resume")
    assert resumed.wait(120) == 0, resumed
    assert [client.wait(20) for client in clients] == [0, 0]
    assert list(history(suite)["round"]) == list(range(1, len(rows) + 4))
    return stopped, resumed, rows


# ---------------------------------------------------------------------------------------------------------------------
# A server that is out of reach. These are started at once, before the first test: most of their time is waiting.

OFFLINE = {
    "no key": "no key is at hand",
    "rejected key": "invalid API key",
    "nobody there": "did not respond in time",
    "silent": "did not respond in time",
    "silent after login": "Failed to get resume status",
    "WANDB_MODE=offline": "WANDB_MODE",
}


@pytest.fixture(scope="module", autouse=True)
def waiting(laptops, stubs):
    """{case: a laptop without its wandb server}, with the stub and the process in it."""
    suites = {
        "no key": laptops(stubs()),
        "rejected key": laptops(stubs(), "f" * 40),
        "nobody there": laptops(f"http://127.0.0.1:{free_port()}", KEY),
        "silent": laptops(stubs("always"), KEY),
        "silent after login": laptops(stubs("after login"), KEY),
        "WANDB_MODE=offline": laptops(
            stubs(), KEY, WANDB_MODE="offline", WANDB_PROJECT="garden", WANDB_NAME="a run", WANDB_ENTITY="lab"
        ),
    }
    for suite in suites.values():
        suite.process = start_curves(suite)
    return suites


@pytest.fixture(scope="module", autouse=True)
def cut_off(laptops, stubs, waiting):
    """A training whose wandb server vanishes after a few rounds; it is under way. Its key is in ~/.netrc."""
    suite = laptops(stubs())
    host = suite.stub.url.removeprefix("http://")
    (suite.root / "home" / ".netrc").write_text(f"machine {host} login user password {KEY}\n")
    suite.server, suite.clients = start_training(suite, 30), start_clients(suite)
    suite.server.wait_for("round 3/", timeout=90)
    suite.stub.close()
    return suite


def test_with_a_key_the_run_is_online_and_goes_on_there_after_a_stop(laptops, stubs):
    suite = laptops(stubs(), KEY)
    stopped, resumed, rows = stop_and_resume(suite)
    ((run_id, run),) = suite.stub.runs.items()
    assert_sent(run, history(suite))
    assert suite.stub.requests.count("RunResumeStatus") == 2 and run["at_start"] == [0, len(rows)]
    assert not any("otel" in request for request in suite.stub.requests)  # wandb's reports to its makers
    checkpoint = torch.load(suite.ckps("Tiny") / "server.ptl", weights_only=True)
    assert checkpoint["wandb_run_id"] == run_id
    for server in (stopped, resumed):
        assert f"curves: {suite.stub.url}/lab/FL-IoT/runs/{run_id}\n" in server.out
        assert "wandb" not in server.err
    assert [alert["title"] for alert in suite.stub.alerts] == ["the run ended early"]
    assert "SIGTERM" in suite.stub.alerts[0]["text"] and suite.stub.alerts[0]["waitDuration"] == 3_600_000
    assert_models_sent(suite, run_id)


@pytest.mark.parametrize("point", ["server.ptl", "wandb"])
def test_with_a_key_a_killed_run_is_complete_after_its_resume(laptops, stubs, point):
    suite = laptops(stubs(), KEY)
    first = suite.client(0, "--dataset", "Tiny")
    killed = start_patched(suite, "server", KILL.format(ROUND_3[point]), "--num_clients", 1, "--num_rounds", 4)
    assert killed.wait(90) == -signal.SIGKILL, killed
    first.kill()
    suite.client(0, "--dataset", "Tiny")
    resumed = suite.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 6, "--resume")
    assert resumed.wait(120) == 0, resumed
    ((_, run),) = suite.stub.runs.items()
    steps, rows = pd.DataFrame([line for _, line in sorted(run["history"].items())]), as_logged(history(suite))
    assert run["complete"] and list(steps["_step"]) == list(rows["round"]) == [1, 2, 3, 4, 5, 6]
    for name in rows.columns[1:]:
        assert list(steps[name]) == pytest.approx(list(rows[name]), nan_ok=True), name


def test_an_outage_in_the_middle_loses_no_row_and_slows_nothing(laptops, stubs):
    suite = laptops(stubs(), KEY)
    server, clients = start_training(suite, 60), start_clients(suite)
    server.wait_for("round 5/", timeout=120)
    suite.stub.close()
    wait_until("more rounds are done without it", lambda: len(history(suite)) >= 25)
    stub = stubs(None, suite.stub)
    assert server.wait(120) == 0 and [client.wait(20) for client in clients] == [0, 0], server
    ((_, run),) = stub.runs.items()
    assert_sent(run, history(suite))


def test_without_a_key_a_resumed_run_is_two_folders_that_sync_into_one(laptops, stubs):
    suite, stub = laptops(), stubs()
    stopped, resumed, rows = stop_and_resume(suite)
    folders = folder_to_send(stopped), folder_to_send(resumed)
    assert sorted((suite.root / "wandb").glob("offline-run-*")) == sorted(folders)
    checkpoint = torch.load(suite.ckps("Tiny") / "server.ptl", weights_only=True)
    assert {folder.name.rpartition("-")[2] for folder in folders} == {checkpoint["wandb_run_id"]}
    assert_same_curves(inspect(folders[0]), rows)
    assert_same_curves(inspect(folders[1]), history(suite).iloc[len(rows) :])
    send_later(suite, stopped, stub)
    send_later(suite, resumed, stub)
    ((run_id, run),) = stub.runs.items()
    assert run_id == checkpoint["wandb_run_id"]
    assert_sent(run, history(suite))


def test_wandb_mode_disabled_trains_and_leaves_nothing_of_wandb(laptops, stubs):
    suite = laptops(stubs(), KEY, WANDB_MODE="disabled")
    server, clients = start_training(suite, 2), start_clients(suite)
    assert server.wait(90) == 0 and [client.wait(20) for client in clients] == [0, 0], server
    assert len(history(suite)) == 2 and "curves: Weights & Biases is disabled (as WANDB_MODE says)\n" in server.out
    assert not (suite.root / "wandb").exists() and suite.stub.requests == []


def test_wandb_mode_online_without_a_key_is_refused_and_asks_nothing(laptops, stubs):
    suite = laptops(stubs(), WANDB_MODE="online")
    command = suite.root / "server.py", "--dataset", "Tiny", "--num_clients", 2, "--server_port", suite.port
    process = on_terminal(suite, *command)
    assert process.wait() == 2, process
    assert " ".join(process.out.split()).startswith(
        "server.py: WANDB_MODE is online, but no key is at hand: run `wandb login`"
    )
    assert not suite.ckps("Tiny").joinpath("server.ptl").exists()


def test_training_outlives_the_process_of_wandb(laptops):
    suite = laptops()
    server = start_training(suite, 30)
    clients = start_clients(suite)
    server.wait_for("round 3/", timeout=90)
    (core,) = [child for child in psutil.Process(server.pid).children(True) if child.name() == "wandb-core"]
    core.kill()
    assert server.wait(90) == 0 and [client.wait(20) for client in clients] == [0, 0], server
    assert list(history(suite)["round"]) == list(range(1, 31))
    assert re.search(r"^curves: .* from round \d+", server.out, re.MULTILINE) and "Traceback" not in server.err


@pytest.mark.parametrize("case", OFFLINE)
def test_out_of_reach_is_offline_with_the_reason_in_one_line_in_time(waiting, case):
    suite = waiting[case]
    assert suite.process.wait(100) == 0, suite.process
    curves, took = suite.process.out.splitlines()
    assert curves.startswith("curves: Weights & Biases is offline (") and OFFLINE[case] in curves
    (step,) = inspect(folder_to_send(suite.process))
    assert step["fit_loss"] == 0.5
    assert float(took.split()[1]) < 80  # two bounds of 30 s, on a busy machine; wandb's own: 101 s, and none at the end
    if case in ("no key", "WANDB_MODE=offline"):
        assert suite.stub.requests == []
    (run,) = [record["run"] for record in wandb_records(folder_to_send(suite.process)) if record["type"] == "run"]
    said = [run.get(name) for name in ("project", "display_name", "entity")]
    assert said == (["garden", "a run", "lab"] if case == "WANDB_MODE=offline" else ["FL-IoT", "Tiny", None])


def test_training_whose_server_vanishes_ends_in_time_and_can_be_sent_later(cut_off, stubs):
    assert cut_off.server.wait(100) == 0, cut_off.server
    assert [client.wait(20) for client in cut_off.clients] == [0, 0]
    rows = history(cut_off)
    assert len(rows) == 30
    ((run_id, run),) = cut_off.stub.runs.items()
    assert not run["complete"] and f"curves: {cut_off.stub.url}/lab/FL-IoT/runs/{run_id}\n" in cut_off.server.out
    assert_same_curves(inspect(folder_to_send(cut_off.server)), rows)
    stub = stubs()
    send_later(cut_off, cut_off.server, stub)
    assert_sent(stub.runs[run_id], rows)
