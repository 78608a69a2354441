"""What make deploy and its siblings say, and what they check on the laptop before they touch the first device.

Ansible's own output is shown with VERBOSE=1, and otherwise for what failed alone.
"""

import datetime
import difflib
import json
import os
import re
import ssl
import sys
import tarfile
from pathlib import Path

from ansible import context
from ansible.errors import AnsibleError
from ansible.plugins.callback import CallbackBase
from ansible.plugins.callback.default import CallbackModule as AnsiblesOwn
from ansible.template import Templar
from cryptography import x509  # which Ansible needs, too

DOCUMENTATION = """
    name: shelf
    type: stdout
    short_description: what devices report, what changed, and at the end which failed and why
    description: Checks the inventory of deploy.yml first. Prints the output of tasks with the tag report.
    extends_documentation_fragment: [default_callback, result_format_callback]
"""
FILES = ("secret_file", "root_certificate", "supernode_key")
TEXTS = (*FILES, "dataset", "server_address", "home", "client_flags", "device_python", "wheelhouse")
KNOWN = (*TEXTS, "cid", "server_port", "supernode")
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Problem(Exception):
    """What is wrong with the inventory or with a file on the laptop, in one line."""


def check_types(own):
    """Check each variable of a device, {name: value}, by itself. Raises Problem."""
    for name in own:
        meant = difflib.get_close_matches(name, KNOWN, 1, 0.85)
        if meant and name not in KNOWN:
            raise Problem(f"{name} is unknown: do you mean {meant[0]}?")
    for name in set(own).intersection(TEXTS):
        if isinstance(own[name], bool) or not isinstance(own[name], (str, int)) or own[name] == "":
            raise Problem(f"{name} is {json.dumps(own[name], default=str)}, not text: put it in quotes")
        if re.search(r"[\n\r]", str(own[name])):
            raise Problem(f"{name} has more than one line")
    if "cid" not in own:
        raise Problem("no cid: give each device one in the inventory")
    if isinstance(own["cid"], bool) or not re.fullmatch(r"0|[1-9]\d*", str(own["cid"])):
        raise Problem(f"cid {own['cid']} is not a whole number from 0 up")
    if "server_address" not in own:
        raise Problem("no server_address: write into the inventory how the devices reach the server")
    for name, shape, what in (
        ("server_address", r"[\w.:%\[\]-]+", "neither a name nor an IP address"),
        ("server_port", r"[1-9]\d{0,4}", "not a number from 1 to 65535"),
        ("dataset", r"\w[\w.-]*", "not a plain name of letters, digits, dots, dashes"),
        ("home", r"(/[\w.:,@+ -]+)+/?", "not a folder from / on, of letters, digits, spaces and .:,@+-"),
        ("supernode", rf"(?i){'|'.join(YES + NO)}", "neither true nor false"),
    ):
        if name in own and not re.fullmatch(shape, str(own[name])):
            raise Problem(f"{name} {own[name]} is {what}")
    if int(own.get("server_port", 1)) > 65535:
        raise Problem(f"server_port {own['server_port']} is not a number from 1 to 65535")


def check_supernode(own):
    """Check that what a device has is of the kind of client that it runs. Raises Problem."""
    as_supernode = str(own.get("supernode", "no")).lower() in YES
    missing = [name for name in ("root_certificate", "supernode_key") if as_supernode and name not in own]
    if missing:
        raise Problem(f"a SuperNode needs {' and '.join(missing)}")
    others = ("secret_file", "client_flags") if as_supernode else ("supernode_key",)
    useless = [name for name in others if name in own]
    if useless:
        whose = "client.py alone, not of a SuperNode" if as_supernode else "a SuperNode alone, with supernode=true"
        raise Problem(f"{' and '.join(useless)}: of {whose}")


def check_bundle(own, suite):
    """Check that the device's cid is one of the split, and that its bundle is there and whole. Raises Problem."""
    dataset, cid = str(own.get("dataset", "CIFAR10")), int(own["cid"])
    path = suite / "datasets" / dataset / "bundles" / f"client_{cid}.tar"
    again = f"run partition.py --dataset {dataset} with --bundles"
    try:
        count = json.loads((path.parent.parent / "dataset.json").read_text(encoding="utf-8"))["num_clients"]
    except (OSError, ValueError, KeyError, TypeError):
        count = None  # it is the bundle that is brought
    if count is not None and cid >= count:
        raise Problem(f"cid {cid} is not in the split of {dataset}, which has {count} shards, 0 to {count - 1}")
    if not path.is_file():
        raise Problem(f"no {path} on this machine: {again}")
    try:
        with tarfile.open(path) as tar, open(path, "rb") as file:
            file.seek(-1024, os.SEEK_END)
            whole = tar.next().name == f"datasets/{dataset}/dataset.json" and not any(file.read())
    except (OSError, tarfile.TarError, AttributeError):
        whole = False
    if not whole:
        raise Problem(f"{path} is damaged, or not a bundle of {dataset}: {again}")


def check_wheelhouse(wheelhouse, suite):
    """Check that wheels come from a folder that has some, or by https. Raises Problem."""
    if "://" not in wheelhouse:
        if not any((suite / wheelhouse).glob("*.whl")):
            raise Problem(f"wheelhouse {wheelhouse} is not a folder with wheels on this machine")
    elif not wheelhouse.startswith("https://"):
        if os.environ.get("INSECURE") != "1":
            raise Problem(f"anyone on the network can change what {wheelhouse} sends: use https, or INSECURE=1")


def check_file(name, path):
    """Check that a file which is brought to devices is there, and is what it is to be. Raises Problem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Problem(f"{name} {path} cannot be read on this machine: {error.strerror}") from None
    if not content.strip():
        raise Problem(f"{name} {path} is empty")
    if name == "supernode_key" and b"PRIVATE KEY-----" not in content:
        raise Problem(f"{name} {path} is not a private key")
    if name == "root_certificate":
        try:
            ssl.create_default_context(cafile=path)
            until = x509.load_pem_x509_certificate(content).not_valid_after_utc
        except (ssl.SSLError, ValueError):
            raise Problem(f"{name} {path} is not a certificate: give the server's ca.pem") from None
        if until < datetime.datetime.now(datetime.UTC):
            raise Problem(f"{name} {path} has expired, on {until:%Y-%m-%d %H:%M} UTC")


def check_shelf(devices, chosen, suite, with_data):
    """What is wrong, {problem: [device, …]}, with the variables of `chosen` of the `devices`, {device: {name: value}}.

    `suite` is the suite's folder on the laptop; with `with_data` each is to get its bundle.
    """
    found = {}

    def check(name, function, *args):
        try:
            function(*args)
        except Problem as problem:
            found.setdefault(str(problem), []).append(name)
            return False
        return True

    for name in chosen:
        own = devices[name]
        if not check(name, check_types, own):
            continue
        namesakes = [other for other in devices if str(devices[other].get("cid")) == str(own["cid"])]
        if len(namesakes) > 1:
            found.setdefault(f"cid {own['cid']} is given to {' and '.join(namesakes)}", []).append(name)
        fits = check(name, check_supernode, own)
        if with_data:
            check(name, check_bundle, own, suite)
        if "wheelhouse" in own:
            check(name, check_wheelhouse, str(own["wheelhouse"]), suite)
        for kind in FILES if fits else ():
            if kind in own:
                check(name, check_file, kind, suite / str(own[kind]))
    return found


def reason(result):
    """The one line that says most, of a task's result."""
    result = next((item for item in result.get("results", ()) if item.get("failed")), result)
    # What a command or ssh prints ends with the reason; what Ansible says begins with it, and goes on with advice.
    quotes = result.get("unreachable") or ">>> Standard Error" in str(result.get("msg"))
    places = {"stderr": -1, "module_stderr": -1, "msg": -1 if quotes else 0, "stdout": -1}
    for name, place in places.items():
        lines = [line.strip() for line in str(result.get(name) or "").splitlines() if line.strip()]
        if lines:
            return lines[place]
    return "no reason given"


class CallbackModule(AnsiblesOwn if os.environ.get("VERBOSE") == "1" else CallbackBase):
    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "shelf"

    def __init__(self):
        super().__init__()
        self.failed, self.reported, self.verbose = {}, set(), isinstance(self, AnsiblesOwn)

    def v2_playbook_on_start(self, playbook):
        super().v2_playbook_on_start(playbook)
        self.suite, self.deploys = Path(playbook._basedir).parent, Path(playbook._file_name).name == "deploy.yml"

    def v2_playbook_on_play_start(self, play):
        manager = play.get_variable_manager()
        chosen = [host.get_name() for host in manager._inventory.get_hosts("all")]
        sources = list(map(str, context.CLIARGS["inventory"]))
        found = {} if chosen else {"no device is named there, or it cannot be read": sources}
        devices = {}
        for host in manager._inventory.get_hosts("all", ignore_limits=True) if self.deploys else ():
            own = manager.get_vars(host=host, include_hostvars=False)
            templar = Templar(manager._loader, variables=own)
            try:
                given = {name: templar.template(own[name]) for name in own if name in KNOWN}
                devices[host.get_name()] = {**own, **given}
            except AnsibleError as error:
                found.setdefault(str(error).splitlines()[0], []).append(host.get_name())
        if self.deploys and not found:
            tags, skipped = context.CLIARGS["tags"], context.CLIARGS["skip_tags"]
            with_data = not {"all", "data"}.isdisjoint(tags) and "data" not in skipped
            found = check_shelf(devices, chosen, self.suite, with_data)
        for problem, names in found.items():
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            self._display.display(f"{', '.join(names[:5])}{more}: {problem}", color="red", stderr=True)
        if found:
            sys.exit(2)
        super().v2_playbook_on_play_start(play)

    def v2_runner_on_ok(self, result):
        super().v2_runner_on_ok(result)
        name, task = result._host.get_name(), result._task
        if "report" in task.tags:
            self.reported.add(name)
            lines = str(result._result.get("stdout", result._result.get("msg", ""))).splitlines()
            self._display.display("\n".join(f"{name}: {line}" for line in lines or ["nothing"]))
        elif result._result.get("changed") and not self.verbose:
            self._display.display(f"{name}: {task.get_name()}")

    def v2_runner_on_failed(self, result, ignore_errors=False):
        if not ignore_errors:
            name, task = result._host.get_name(), result._task.get_name()
            self.failed[name] = f"{task}: {reason(result._result)}"
            if not self.verbose:
                self._display.display(f"{name}: {task}: {self._dump_results(result._result)}", color="red")
        super().v2_runner_on_failed(result, ignore_errors)

    def v2_runner_on_unreachable(self, result):
        self.failed[result._host.get_name()] = f"not reached: {reason({**result._result, 'unreachable': True})}"
        super().v2_runner_on_unreachable(result)

    def v2_playbook_on_stats(self, stats):
        super().v2_playbook_on_stats(stats)
        for name in sorted(set(stats.processed) - set(self.failed) - (set() if self.deploys else self.reported)):
            self._display.display(f"{name}: done, {stats.changed.get(name, 0)} changed")
        for name in sorted(self.failed):
            self._display.display(f"{name} FAILED: {self.failed[name]}", color="red")
