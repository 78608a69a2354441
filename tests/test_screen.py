"""What people see of a run: its curves, the terminal, the pictures and the files, after runs of real processes."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

from plumbing.laptop import listening, pictures
from plumbing.laptop.curves import Curves
from plumbing.laptop.history import CLIENT_COLUMNS, COLUMNS, TIMES
from plumbing.laptop.screen import list_accuracies

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from helpers import (
    ROOT,
    Network,
    as_logged,
    history,
    lines,
    new_suite,
    start_patched,
    tree,
    wandb_folders,
    wandb_records,
)
from test_machine import FAKE_SENSORS
from test_wandb_run import ON_TERMINAL

import server

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}


def of_kind(records, kind):
    return [one[kind] for one in records if one["type"] == kind]


def config_of(records):
    """The config at the end: what was set at the start and later, without wandb's own."""
    config = {}
    for update in [one["config"] for one in of_kind(records, "run")] + of_kind(records, "config"):
        config.update(update.get("update", {}))
    return config


def table_of(folder, records, key):
    """The table that was logged under `key`, as a DataFrame."""
    items = [one["item"] for one in of_kind(records, "history")]
    (path,) = [item[f"{key}.path"] for item in items if f"{key}.path" in item]
    table = json.loads((folder / "files" / path).read_text())
    return pd.DataFrame(table["data"], columns=table["columns"])


@pytest.fixture(scope="module")
def shown(tmp_path_factory, three_shards):
    """A suite whose three clients have trained: cid 0 on a weak power supply, cid 2 gone after a few rounds."""
    suite = new_suite(tmp_path_factory.mktemp("shown"), three_shards)
    suite.laptop = suite.server("--dataset", "Tiny", "--num_clients", 3, "--min_clients", 2, "--num_rounds", 40)
    weak = FAKE_SENSORS.replace("{cid}", "0").replace("{bits}", "0x50005")
    suite.clients = [start_patched(suite, "client", weak, "--num_threads", 1, "--cid", 0)]
    suite.clients += [suite.client(cid, "--dataset", "Tiny") for cid in (1, 2)]
    suite.laptop.wait_for("round 2/40", timeout=300)
    suite.clients[2].kill()
    assert suite.laptop.wait(300) == 0, suite.laptop
    assert [client.wait(60) for client in suite.clients[:2]] == [0, 0]
    (suite.wandb,) = wandb_folders(suite)
    suite.records = wandb_records(suite.wandb)
    yield suite
    suite.close()


def test_every_figure_is_logged_by_round_and_the_table_of_runs_shows_the_best(shown):
    metrics = {one.get("name") or one["glob_name"]: one for one in of_kind(shown.records, "metric")}
    assert {one["step_metric"] for one in metrics.values()} == {"round"} and "*" in metrics
    assert metrics["test_accuracy"]["summary"] == {"max": True} and metrics["test_loss"]["summary"] == {"min": True}
    rows, steps = history(shown), pd.DataFrame([one["item"] for one in of_kind(shown.records, "history")])
    assert "clients" not in steps and list(steps["round"]) == list(rows["round"])
    for name in as_logged(rows).columns[1:]:
        values = list(as_logged(rows)[name])
        of_system = "num_clients", "failures", "round_seconds", "bytes_down", "bytes_up"
        section = "system" if name in of_system else name.rpartition("_")[0]
        grouped = f"{section}/{name if section == 'system' else name.rpartition('_')[2]}"
        assert list(steps[name]) == pytest.approx(values) and list(steps[grouped]) == pytest.approx(values), name
    summary = {}
    for one in of_kind(shown.records, "summary"):
        summary.update(one.get("update", {}))
    assert summary["test_accuracy"]["max"] == pytest.approx(rows["test_accuracy"].max())
    assert summary["test_loss"]["min"] == pytest.approx(rows["test_loss"].min())


def test_config_says_with_what_on_what_and_by_whom_it_was_made(shown):
    config, facts = config_of(shown.records), json.loads((shown.root / "datasets/Tiny/dataset.json").read_text())
    assert config["num_rounds"] == 40 and config["lr"] == 1e-3 and config["min_clients"] == 2
    for name in ("classes", "num_train", "num_test", "partition", "seed", "checksum", "image_size"):
        assert config.get(f"data.{name}", config.get("data", {}).get(name)) == facts[name], name
    flat = json.dumps(config)
    for cid in range(3):
        assert f"clients/{cid}" in flat
    for fact in (os.uname().machine, torch.__version__, '"num_fit', '"num_eval', "board", "python", "flwr"):
        assert fact.strip('"') in flat, fact
    assert "git_commit" not in config  # the suite is a bare copy here


def test_commit_of_the_code_is_git_s_own(tmp_path):
    shutil.copytree(ROOT / "plumbing", tmp_path / "plumbing", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "nets.py", tmp_path)
    git = ["git", "-C", tmp_path, "-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    code = "import json; from plumbing.laptop.wandb_run import describe_code; print(json.dumps(describe_code()))"

    def described():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True, timeout=120)
        return json.loads(done.stdout)

    subprocess.run([*git, "init", "-q"], check=True)
    assert described() == {}  # a repository that has nothing of ours
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "all"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert described() == {"git_commit": head, "git_modified": False}
    (tmp_path / "nets.py").write_text((ROOT / "nets.py").read_text() + "\n")
    assert described() == {"git_commit": head, "git_modified": True}


def test_split_is_a_table_of_clients_and_classes(shown):
    table = table_of(shown.wandb, shown.records, "split")
    classes = json.loads((shown.root / "datasets/Tiny/dataset.json").read_text())["classes"]
    assert list(table.columns) == ["cid", *classes] and list(table["cid"]) == [0, 1, 2]
    for cid in range(3):
        labels = pd.read_csv(shown.root / f"datasets/Tiny/clients/client_{cid}.csv")["label"]
        assert list(table.iloc[cid, 1:]) == list(np.bincount(labels, minlength=len(classes)))


@pytest.fixture(scope="module")
def answers(shown):
    """What the best model makes of the test images, by plain torch: [(label, answer), …], and the classes."""
    sys.path.insert(0, str(ROOT))
    from nets import load_checkpoint

    model, checkpoint = load_checkpoint(shown.ckps("Tiny") / "best.ptl")
    table = pd.read_csv(shown.root / "datasets/Tiny/test.csv")
    images = np.stack([np.load(shown.root / f"datasets/Tiny/test/{name}.npy") for name in table["id"]])
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255)))
    return table["label"].to_numpy(), logits.argmax(1).numpy(), checkpoint["classes"]


def test_confusions_and_accuracies_by_class_are_those_of_the_best_model(shown, answers):
    truths, said, classes = answers
    table = table_of(shown.wandb, shown.records, "test/confusion_table")
    for actual, predicted, count in table.itertuples(index=False):
        expected = ((truths == classes.index(actual)) & (said == classes.index(predicted))).sum()
        assert count == expected, (actual, predicted)
    assert len(table) == len(classes) ** 2
    found = dict(table_of(shown.wandb, shown.records, "test/class_accuracy_table").itertuples(index=False))
    (line,) = lines(shown.laptop, "its accuracy by class: ")
    printed = dict(pair.rsplit(" ", 1) for pair in line.split(": ")[1].split(", "))
    for label, name in enumerate(classes):
        accuracy = (said[truths == label] == label).mean()
        assert found[name] == pytest.approx(accuracy) and float(printed[name]) == pytest.approx(accuracy, abs=0.006)


def test_alerts_for_a_weak_power_supply_and_a_lost_device_come_once(shown):
    alerts = {one["title"]: one for one in of_kind(shown.records, "alert")}
    assert set(alerts) == {"cid 0: power supply too weak", "cid 2: missing for 3 rounds"}
    assert len(alerts) == len(of_kind(shown.records, "alert"))
    assert "Tiny" in alerts["cid 2: missing for 3 rounds"]["text"]
    last = pd.read_csv(shown.ckps("Tiny") / "clients.csv").query("cid == 2")["round"].max()
    assert f"round {last + 3}:" in alerts["cid 2: missing for 3 rounds"]["text"]


def test_a_device_that_holds_up_the_rounds_and_an_early_end_raise_alerts(tiny):
    code = "from plumbing.laptop import asking; asking.LEAST_PATIENCE = 1"
    laptop = start_patched(tiny, "server", code, "--num_clients", 2, "--num_rounds", 100_000)
    clients = [tiny.client(cid, "--dataset", "Tiny") for cid in range(2)]
    laptop.wait_for("round 5/", timeout=300)
    clients[1].kill()
    laptop.wait_for("waiting for 1 of 2 clients: cid 1", timeout=120)
    time.sleep(2)
    laptop.send(signal.SIGTERM)
    assert laptop.wait(120) == 143, laptop
    rows = history(tiny)
    alerts = of_kind(wandb_records(wandb_folders(tiny)[0]), "alert")
    assert [one["title"].split(" for ")[0] for one in alerts] == ["cid 1: missing", "the run ended early"], alerts
    assert alerts[1]["text"] == f"Tiny, after round {len(rows)}: SIGTERM"


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.


def test_terminal_says_what_is_trained_by_whom_and_what_came_of_it(shown):
    out = shown.laptop.out
    assert "Tiny: 10 classes, 600 images in 3 shards (iid), 100 for the test; LeNet5: 62,050 parameters\n" in out
    for cid in range(3):
        (line,) = lines(shown.laptop, f"cid {cid} joined")
        assert line.endswith(" of 3 clients): x86_64, 160 fit + 40 eval images") or os.uname().machine != "x86_64"
    rows, table = history(shown), pd.read_csv(shown.ckps("Tiny") / "clients.csv")
    best = rows["test_accuracy"].idxmax()
    assert f"best round: {rows['round'][best]} of 40, test_accuracy {rows['test_accuracy'][best]:.3f}\n" in out
    medians = table.groupby("cid")["fit_seconds"].median()
    told = [re.search(r"fit (\S+) s \(median\)", line)[1] for line in lines(shown.laptop, " s (median)")]
    assert [float(text) for text in told] == pytest.approx(list(medians), rel=0.06) and "0.0" not in told
    client = [line for line in lines(shown.clients[1], "fit_loss")]
    assert re.match(r"round 7/40  waited \d+\.\d s  fit_loss ", client[6])
    told = table.query("cid == 1").set_index("round")["wait_seconds"]
    waited = sum(float(re.search(r"waited ([\d.]+) s", line)[1]) for line in client)
    assert waited == pytest.approx(told.sum(), abs=0.05 * len(client) + 0.5)


def test_the_command_that_is_shown_starts_a_client_and_a_bar_shows_the_rounds_until_ctrl_c(tiny):
    (tiny.root / ".venv").symlink_to(ROOT / ".venv")
    subprocess.run(["bash", tiny.root / "deploy/make_certificates.sh", "127.0.0.1"], capture_output=True, check=True)
    secret = tiny.root / "the secret"
    secret.write_text("tell nobody, not even me")
    secret.chmod(0o600)
    flags = ["--secret_file", secret, "--certificates", tiny.root / "certificates", "--server_port", tiny.port]
    args = [tiny.root / "server.py", "--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 100, *flags]
    laptop = tiny.start("-c", ON_TERMINAL, sys.executable, *args, env={"COLUMNS": "80"})
    laptop.wait_for("--cid 0", timeout=120)
    command = laptop.out.replace("\r", "").split("run on the device:\n")[1]  # over lines that end in backslashes
    command = command[: command.index("--cid 0") + len("--cid 0")]
    client = subprocess.Popen(
        shlex.split(command.replace("\\\n", "")), cwd=tiny.root, env=tiny.env, stdout=subprocess.DEVNULL
    )
    try:
        laptop.wait_for("round 20/100", timeout=120)
        laptop.send(signal.SIGINT)
        assert laptop.wait(120) == 130, laptop
    finally:
        client.kill()
    before, after = laptop.out.split("^C")
    assert re.match(r"\s*\x1b\[K(round .*\n+)?stopping \(SIGINT; ", after), laptop  # the line of the ^C is cleared
    assert " to go" not in after and len(before.splitlines()[-1]) + len("^C") < 80
    row, said = history(tiny).iloc[2], laptop.out.replace("\r", "\n")
    figures = "  ".join(f"{name} {row[name]:.3f}" for name in ("fit_loss", "test_loss", "test_accuracy"))
    assert re.search(rf"^round 3/100  {re.escape(figures)}  \d+\.\d s$", said, re.MULTILINE), laptop
    assert re.search(r"^round \d+/100 █+.? +\d+\.\d s per round, \d\d:\d\d to go$", said, re.MULTILINE), laptop
    too_long = [line for line in said.splitlines() if len(line) > 80]
    assert all(len(line.split()) == 1 or line.endswith(" \\") for line in too_long), too_long  # long paths


def arguments(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["server.py", "--num_clients", "10", *map(str, args)])
    parsed = server.parse_args()
    parsed.num_clients = 10
    return parsed


@pytest.mark.skipif(os.geteuid() != 0, reason="needs network namespaces")
def test_on_all_networks_the_command_has_an_address_of_this_machine():
    network = Network()
    network.open()
    try:
        code = "import sys; sys.argv = ['server.py', '--server_address', '0.0.0.0', '--num_clients', '10']\n"
        code += "import server; from plumbing.laptop.listening import describe_client_command\n"
        code += "print(describe_client_command(server.parse_args()))"
        command = ["ip", "netns", "exec", network.server, sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    finally:
        network.close()
    assert done.stdout == (
        "run on each device (N = 0…9): .venv/bin/python client.py "
        f"--server_address {Network.address} --dataset CIFAR10 --cid N\n"
    )


def test_the_command_has_the_address_that_the_certificate_names(tmp_path, monkeypatch):
    (tmp_path / "deploy").mkdir()
    script = tmp_path / "deploy/make_certificates.sh"
    script.write_bytes((ROOT / "deploy/make_certificates.sh").read_bytes())
    monkeypatch.setattr(listening, "own_addresses", lambda: ["192.0.2.7", "192.0.2.8"])
    for names, expected in ((["192.0.2.8"], "192.0.2.8"), (["laptop.local"], "laptop.local")):
        subprocess.run(["bash", script, *names], capture_output=True, check=True, timeout=60)
        args = arguments(monkeypatch, "--server_address", "0.0.0.0", "--certificates", tmp_path / "certificates")
        assert f"client.py --server_address {expected} --dataset CIFAR10 " in listening.describe_client_command(args)
    said = listening.describe_client_command(arguments(monkeypatch, "--server_address", "::"))
    assert "--server_address 192.0.2.7 " in said and "(this machine is also 192.0.2.8)" in said
    assert "--server_address laptop.local " in listening.describe_client_command(
        arguments(monkeypatch, "--server_address", "laptop.local")
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files and pictures.


def named_files():
    """The paths in the first column of the table of files in docs/files.md."""
    text = PAGES["files.md"].split("\n## ")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_a_run_leaves_exactly_the_files_of_the_table_in_the_docs(shown):
    left = {name for name, content in tree(shown.root / "ckps").items() if content is not None}
    left.discard("ckps/Tiny/.client_2.ptl.part")  # that device was killed, perhaps while it wrote this
    left |= {"wandb/" for _ in (shown.root / "wandb").glob("*")}
    left = {name if name == "wandb/" else f"ckps/{name}" for name in left}
    named = named_files()
    later = {"ckps/<dataset>.<date>/"}  # an earlier run's, which is moved
    later |= {"ckps/<dataset>/client_<cid>.bn", "ckps/<dataset>/client_<cid>.log"}  # with --fedbn, and of the demo
    assert later <= named
    expected = {name.replace("<dataset>", "Tiny") for name in named - later if not name.startswith("datasets/")}
    expected = {one.replace("<cid>", str(cid)) for one in expected for cid in range(3)}
    assert left == expected
    made = {name for name, content in tree(shown.root / "datasets/Tiny").items()}
    patterns = {name for name in named if name.startswith("datasets/")}
    for name in ("test.csv", "dataset.json", "clients/client_1.csv"):
        assert name in made and f"datasets/<dataset>/{name}".replace("1.csv", "<cid>.csv") in patterns
    home = {name.name for name in (shown.root).iterdir()} - {path.name for path in ROOT.glob("*.py")}
    assert {name for name in home if not name.startswith("process_")} <= {
        *("datasets", "ckps", "wandb", "deploy", "plumbing", "orders", "__pycache__")
    }


def quoted_lines():
    """What the scripts print, according to docs/messages.md; the README has the commonest of these."""
    of_readme = PAGES["README.md"].split("## When it goes wrong\n")[1].split("\n## ")[0]
    quoted, commonest = (
        re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE) for text in (PAGES["messages.md"], of_readme)
    )
    assert len(commonest) >= 8 and set(commonest) <= set(quoted)
    return quoted


TRIGGERED = ("server.py: no dataset", "server.py: cannot listen", "server.py: another", "waiting for", "no server at",
             "client.py: there is no", "curves:")  # fmt: skip


def test_lines_that_the_docs_explain_are_printed(shown):
    """Those that cost no more than a start of a script are caused here; of all, what is fixed stands in the sources."""
    quoted = quoted_lines()
    lock = FileLock(str(shown.ckps("Tiny") / "server.lock"))
    with socket.socket() as taken, lock:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = [
            shown.server("--dataset", "Nothing"),
            shown.start("server.py", "--dataset", "Tiny", "--server_port", taken.getsockname()[1]),
            shown.server("--dataset", "Tiny"),
            shown.client(7, "--dataset", "Tiny"),
            shown.client(2, "--dataset", "Tiny", "--max_wait_time", 1),
        ]
        assert [process.wait(120) for process in started] == [2, 2, 2, 2, 1]
    said = shown.laptop.out + "".join(process.out + process.err for process in started)
    sources = [path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/**/*.py")]]
    constants = [node.value for text in sources for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    texts = [value for value in constants if isinstance(value, str)]
    assert len(quoted) > 15 and sum(line.startswith(TRIGGERED) for line in quoted) == len(TRIGGERED)
    for line in quoted:
        if line.startswith(TRIGGERED):
            assert re.search("^" + re.escape(line).replace("…", ".+") + "$", said, re.MULTILINE), line
            continue
        line = re.sub(r"^\w+\.py: (the server turned this client away: )?", "", line)
        line = line.replace(" is nan,", "").replace("; trying again", "")  # a value; and what is added to all of these
        for part in line.split("…"):
            assert any(part.strip(" :") in text for text in texts), (line, part)


def test_docs_explain_all_columns_and_read_them_so(shown, capsys):
    assert [name for name in {*COLUMNS, *CLIENT_COLUMNS} if f"`{name}`" not in PAGES["files.md"]] == []
    code = re.search(r"```python\n(.*?)```", PAGES["report.md"], re.DOTALL)[1]
    exec(code.replace("ckps/CIFAR10", str(shown.ckps("Tiny"))), {})
    assert "test_accuracy" in capsys.readouterr().out


def test_pictures_have_something_to_show(shown):
    for name in ("metrics.png", "confusion.png", "devices.png"):
        picture = cv2.imread(str(shown.ckps("Tiny") / name))
        assert picture.shape[1] > 800 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 8, name


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib has them; a warning while one is drawn is a failure."""
    from matplotlib.figure import Figure

    figures, real = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield figures


def row_of(current, value):
    return {name: value for name in COLUMNS} | {"round": current}


@pytest.mark.parametrize("kind, others", [("png", []), ("pdf", [b"%PDF"]), ("svg", [b"<?xml"])])
def test_pictures_come_as_png_and_in_the_format_that_is_asked_for_and_no_other_is_left(tmp_path, kind, others):
    for name in ("pdf", "svg"):
        (tmp_path / f"metrics.{name}").write_text("of an earlier run")
    pictures.draw_metrics([row_of(1, 0.5)], tmp_path / f"metrics.{kind}", "D")
    starts = [path.read_bytes()[:10] for path in sorted(tmp_path.iterdir(), key=lambda path: path.suffix != ".png")]
    assert len(starts) == 1 + len(others)
    assert all(start.startswith(magic) for start, magic in zip(starts, [b"\x89PNG", *others]))


def test_metrics_say_what_was_trained_what_is_best_and_where_the_run_was_resumed(tmp_path, drawn):
    usual = {name: server.make_parser().get_default(name) for name in pictures.USUAL}
    assert pictures.USUAL == {**usual, "augment": False}  # whose default is the net's
    about = {"dataset": "D", "partition": "dirichlet, alpha 0.5"}
    args = {"net": "LeNet5", "num_clients": 10, "num_epochs": 1, **usual}
    title = pictures.describe_run({**about, "args": args})
    other = {"strategy": "FedMedian", "proximal_mu": 0.1, "fedbn": True, "augment": True, "time_budget": "auto"}
    assert pictures.describe_run({**about, "args": {**args, **other}}) == (
        f"{title}, FedMedian, proximal_mu 0.1, fedbn, augment, time_budget auto"
    )
    rows = [row_of(current, current / 10) for current in range(1, 6)]
    pictures.draw_metrics(rows, tmp_path / "metrics.png", title, [2, 5])  # no round has followed the last one
    assert drawn[0].get_suptitle() == "D (dirichlet, alpha 0.5): LeNet5, 10 clients, 1 epoch per round"
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "local training (fit)",
        "local evaluation (eval)",
        "global model on devices (global_eval)",
        "global model on test set (test)",
        "best: the highest test accuracy, 0.500 in round 5",
        "resumed after round 2",
    ]
    for axes in drawn[0].axes:
        assert [list(line.get_xdata()) for line in axes.lines[5:]] == [[2.5, 2.5]]


@pytest.mark.parametrize("rounds", [1, 5, 300])
def test_metrics_have_their_look_and_the_best_round_is_marked(tmp_path, drawn, rounds):
    rows = [row_of(current, 1 - 1 / (current + 1)) for current in range(1, rounds + 1)]
    rows[rounds // 2]["test_accuracy"] = 2.0
    pictures.draw_metrics(rows, tmp_path / "metrics.png", "a$b^$ \u65e5")
    for axes in drawn[0].axes:
        looks = {line.get_label().rsplit("_", 1)[0]: line.get_linestyle() for line in axes.lines}
        assert (looks["fit"], looks["eval"], looks["test"]) == ("-", "--", ":")
        assert {line.get_marker() for line in axes.lines} == {"." if rounds < 20 else "", "*"}  # as in the legend
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert [list(star.get_xdata()) for star in stars] == [[rounds // 2 + 1]]
    assert (tmp_path / "metrics.png").stat().st_size > 5000


def test_a_figure_between_gaps_is_seen(tmp_path, drawn):
    rows = [row_of(current, float("nan") if current % 2 else 0.5) for current in range(1, 41)]
    pictures.draw_metrics(rows, tmp_path / "metrics.png", "gaps")
    for axes in drawn[0].axes:
        for line in axes.lines[:4]:
            assert list(np.flatnonzero(line.get_markevery())) == list(range(1, 40, 2))


@pytest.mark.parametrize("num_devices, rounds", [(1, 1), (10, 60), (100, 60)])
def test_the_straggler_stands_out_and_nothing_is_hidden(tmp_path, drawn, num_devices, rounds):
    clients, slow = {}, num_devices // 2
    for cid in range(num_devices):
        times = {"fit_seconds": 12.0 if cid == slow else 4.0, "eval_seconds": 0.5, "wait_seconds": 9.0}
        clients[str(cid)] = [{"round": current, **times} for current in range(1, rounds + 1)]
    clients["0"][0]["fit_seconds"] = 900.0  # a pause, which is to be seen, and not to hide the rest
    pictures.draw_devices(clients, tmp_path / "devices.png", "D")
    (axes,) = drawn[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert f"cid {slow}" in labels and len(labels) == min(num_devices, 50)
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    medians = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in dots[: len(labels)]}
    assert medians.pop(labels.index(f"cid {slow}")) == (12.0 if rounds > 1 else 900.0)
    assert set(medians.values()) <= {4.0}
    assert max(max(line.get_xdata()) for line in axes.lines) == 900.0 < axes.get_xlim()[1]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(one.overlaps(other) for one, other in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("value", [float("nan"), 1.7e308, -1e308])
def test_absurd_times_end_no_drawing(tmp_path, drawn, value):
    pictures.draw_devices({"0": [{"round": 3, **dict.fromkeys(TIMES, value)}]}, tmp_path / "absurd.png", "D")


@pytest.mark.parametrize("num_classes, share, rows", [(2, 0, 4), (100, 0, 100**2), (300, 0, 300), (300, 1, None)])
def test_confusions_are_sent_whole_or_not_at_all_which_is_said(capsys, num_classes, share, rows):
    """`share` of the pairs of classes are mistaken for each other; wandb keeps the first 10,000 rows of a table."""
    logged, counts = {}, 3 * np.eye(num_classes, dtype=int)
    counts[np.random.RandomState(0).rand(*counts.shape) < share] += 1
    run = SimpleNamespace(log=lambda figures, step: logged.update(figures), finish=lambda: None)
    curves = Curves(run)
    curves.log_round({"round": 1}, {})
    curves.finish({}, counts, None)
    assert len(logged["test/class_accuracy"].table.data) == num_classes
    (said,) = capsys.readouterr().out.splitlines() or [""]
    if rows is None:
        assert "test/confusion" not in logged and said.startswith("curves: test/confusion is not sent, for its 90,000")
        return
    table = logged["test/confusion"].table.data
    sent = np.zeros_like(counts)
    for actual, predicted, count in table:
        sent[int(actual), int(predicted)] += count
    assert len(table) == rows and said == ""
    np.testing.assert_array_equal(sent, counts)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_confusions_are_drawn_for_any_number_of_classes(tmp_path, drawn, num_classes):
    counts = np.random.RandomState(0).randint(0, 9, (num_classes, num_classes))
    counts[1] = 0  # no image of this class in the test set
    names = [f"${name}^ \u65e5" for name in range(num_classes)]
    pictures.draw_confusion(counts, names, tmp_path / "confusion.png", "D")
    axes = drawn[0].axes[0]
    (bar,) = axes.child_axes
    assert bar.get_window_extent().height == pytest.approx(axes.get_window_extent().height)
    assert len(axes.texts) == (np.count_nonzero(counts) if num_classes <= 20 else 0)
    np.testing.assert_allclose(axes.images[0].get_array()[0], counts[0] / counts[0].sum())
    text = list_accuracies(counts, names)
    assert "nan" not in text and text.count(",") < 12
    assert num_classes > 12 or f"{counts[0, 0] / counts[0].sum():.2f}" in text
