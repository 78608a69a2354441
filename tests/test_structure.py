"""The rules of the house: what lies where, who may import whom, and how long a file, a class, a function may be.

Each rule takes the files, {path from the root: source}, and returns what breaks it, with file and line.
"""

import ast
import contextlib
import importlib.util

import pytest
from helpers import ROOT

SCRIPTS = {  # the modules at the root, and those of them that each may import
    "libs": (),
    "nets": ("libs",),
    "data": ("libs", "nets"),
    "engines": ("libs", "nets", "data"),
    "strategies": ("libs", "nets", "data", "engines"),
    "server": ("libs", "nets", "data", "engines", "strategies"),
    "client": ("libs", "nets", "data", "engines"),
    "partition": ("libs",),
}
ROOMS = {"common": (), "device": ("common",), "laptop": ("common",), "sources": ("common",)}  # of plumbing, likewise
LINES = {"script": 299, "plumbing": 250, "class": 120, "function": 60}  # at most
PARAMETERS = 6  # at most, without self, *args and **kwargs
MANY_PARAMETERS = ("client_fit_fn",)  # whose parameters are the contract's
LAPTOP_ONLY = ("pandas", "wandb", "matplotlib")
PUBLIC_FLOWER = {"flwr", "flwr.client", "flwr.common", "flwr.server", "flwr.server.strategy"}
FLOWERS_INSIDES = ("plumbing/laptop/nodes.py",)


def read_files(root):
    """Return the suite's own modules in the folder `root`: {path from there: source}."""
    paths = [*root.glob("*.py"), *root.glob("plumbing/**/*.py")]
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in sorted(paths)}


def module_name(path):
    return path[: -len(".py")].replace("/", ".").replace(".__init__", "")


def nodes_of(files, *kinds):
    """Yield (path, node) for the nodes of these kinds, wherever they stand in a file."""
    for path, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds):
                yield path, node


def imports_of(files):
    """Yield (path, line, name) for what is imported, at the top or in a function: `from a import b` is "a.b"."""
    for path, node in nodes_of(files, ast.Import, ast.ImportFrom):
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.level:
            prefix = f"{'.' * node.level}{prefix}"
        for alias in node.names:
            yield path, node.lineno, prefix + alias.name


def is_below(name, module):
    return name == module or name.startswith(f"{module}.")


def room_of(name):
    """Return the room of a module of plumbing, by its name; None if it is in none."""
    parts = name.split(".")
    return parts[1] if parts[0] == "plumbing" and len(parts) > 1 and parts[1] in ROOMS else None


# ---------------------------------------------------------------------------------------------------------------------
# The rules.


def root_has_the_scripts_alone(files):
    found = {path for path in files if "/" not in path}
    wanted = {f"{name}.py" for name in SCRIPTS}
    more = [f"{path}:1: does not belong at the root" for path in sorted(found - wanted)]
    return more + [f"{path}:1: is missing" for path in sorted(wanted - found)]


def plumbing_has_its_rooms_alone(files):
    names = {path: module_name(path) for path in files if path.startswith("plumbing/")}
    return [f"{path}:1: is in no room" for path, name in names.items() if name != "plumbing" and not room_of(name)]


def modules_say_what_they_hold(files):
    return [f"{path}:1: has no docstring" for path, source in files.items() if not ast.get_docstring(ast.parse(source))]


def files_are_short(files):
    found = []
    for path, source in files.items():
        lines, most = len(source.splitlines()), LINES["plumbing" if "/" in path else "script"]
        if lines > most:
            found.append(f"{path}:{most + 1}: has {lines} lines, {most} at most")
    return found


def classes_and_functions_are_short(files):
    kinds = {ast.ClassDef: "class", ast.FunctionDef: "function", ast.AsyncFunctionDef: "function"}
    found = []
    for path, node in nodes_of(files, *kinds):
        lines, most = node.end_lineno - node.lineno + 1, LINES[kinds[type(node)]]
        if lines > most:
            found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, {most} at most")
    return found


def functions_have_few_parameters(files):
    found = []
    for path, node in nodes_of(files, ast.FunctionDef, ast.AsyncFunctionDef):
        names = [arg.arg for arg in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        number = len([name for name in names if name not in ("self", "cls")])
        if number > PARAMETERS and node.name not in MANY_PARAMETERS:
            found.append(f"{path}:{node.lineno}: {node.name} has {number} parameters, {PARAMETERS} at most")
    return found


def scripts_import_one_way(files):
    found = []
    for path, line, name in imports_of(files):
        own, other = module_name(path), name.split(".")[0]
        if own in SCRIPTS and other in SCRIPTS and other not in SCRIPTS[own]:
            found.append(f"{path}:{line}: imports {other}")
    return found


def plumbing_imports_no_script(files):
    roots = {*SCRIPTS, *(module_name(path) for path in files if "/" not in path)}
    return [
        f"{path}:{line}: imports {name}"
        for path, line, name in imports_of(files)
        if path.startswith("plumbing/") and (name.split(".")[0] in roots or name.startswith("."))
    ]


def rooms_import_what_they_may(files):
    found = []
    for path, line, name in imports_of(files):
        own, other = room_of(module_name(path)), room_of(name)
        in_plumbing = path.startswith("plumbing/")
        if in_plumbing and other not in (None, own, *ROOMS.get(own, ())):
            found.append(f"{path}:{line}: imports {name}")
        if module_name(path) in ("client", "nets", "data", "engines", "libs") and other in ("laptop", "sources"):
            found.append(f"{path}:{line}: imports {name}, and devices have no {other}")
    return found


def only_the_laptop_has_pandas(files):
    return [
        f"{path}:{line}: imports {name}"
        for path, line, name in imports_of(files)
        if name.split(".")[0] in LAPTOP_ONLY and room_of(module_name(path)) not in ("laptop", "sources")
    ]


def flowers_insides_are_in_few_places(files):
    found = []
    for path, line, name in imports_of(files):
        if not is_below(name, "flwr") or path in FLOWERS_INSIDES:
            continue
        is_module = False
        with contextlib.suppress(ImportError):  # such as ModuleNotFoundError: its parent is a class, or no longer there
            is_module = importlib.util.find_spec(name) is not None
        module = name if is_module or name == "flwr" else name.rpartition(".")[0]
        if module not in PUBLIC_FLOWER:
            found.append(f"{path}:{line}: imports {name}")
    return found


def no_circle(files):
    """Find modules that import each other, directly or by way of others, wherever in the file."""
    paths = {module_name(path): path for path in files}
    graph = {name: {} for name in paths}  # module: {module that it imports: line}
    for path, line, name in imports_of(files):
        target = name if name in paths else name.rpartition(".")[0]
        if target in paths and target != module_name(path):
            graph[module_name(path)].setdefault(target, line)

    def reach(name, seen):
        for target in graph[name]:
            if target not in seen:
                seen.add(target)
                reach(target, seen)
        return seen

    return [
        f"{paths[name]}:{line}: imports {target}, which imports {name} in the end"
        for name, targets in graph.items()
        for target, line in targets.items()
        if name in reach(target, set())
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The house, and for each rule a small one that breaks it: {path: source}, and the beginning of what is found.

LONG = "x = 1\n"
BROKEN = {
    root_has_the_scripts_alone: [({"record.py": ""}, "record.py:1")],
    plumbing_has_its_rooms_alone: [
        ({"plumbing/wire.py": ""}, "plumbing/wire.py:1"),
        ({"plumbing/attic/wire.py": ""}, "plumbing/attic/wire.py:1"),
    ],
    modules_say_what_they_hold: [({"plumbing/common/wire.py": "import os\n"}, "plumbing/common/wire.py:1")],
    files_are_short: [
        ({"server.py": LONG * 300}, "server.py:300: has 300 lines"),
        ({"plumbing/laptop/record.py": LONG * 251}, "plumbing/laptop/record.py:251"),
    ],
    classes_and_functions_are_short: [
        ({"nets.py": "\nclass Big:\n" + "    x = 1\n" * 120}, "nets.py:2: Big has 121 lines"),
        ({"nets.py": "class Net:\n    def big(self):\n" + "        x = 1\n" * 60}, "nets.py:2: big has 61 lines"),
    ],
    functions_have_few_parameters: [
        (
            {"nets.py": "class Net:\n    def __init__(self, a, b, c, d, e, *, f, g):\n        pass\n"},
            "nets.py:2: __init__",
        )
    ],
    scripts_import_one_way: [
        ({"nets.py": "def f():\n    from engines import run_epoch\n"}, "nets.py:2: imports engines"),
        ({"client.py": "import server\n"}, "client.py:1: imports server"),
        ({"server.py": "import libs\nfrom client import Client\n"}, "server.py:2: imports client"),
    ],
    plumbing_imports_no_script: [
        ({"plumbing/common/wire.py": "import os\nfrom libs import np\n"}, "plumbing/common/wire.py:2: imports libs.np"),
        ({"plumbing/common/wire.py": "from . import files\n"}, "plumbing/common/wire.py:1"),
    ],
    rooms_import_what_they_may: [
        ({"plumbing/device/task.py": "from plumbing.laptop.record import Record\n"}, "plumbing/device/task.py:1"),
        ({"plumbing/laptop/record.py": "from plumbing import device\n"}, "plumbing/laptop/record.py:1"),
        ({"plumbing/common/wire.py": "import plumbing.sources.idx\n"}, "plumbing/common/wire.py:1"),
        ({"data.py": "from plumbing.laptop import history\n"}, "data.py:1"),
    ],
    only_the_laptop_has_pandas: [
        ({"server.py": "import os\nimport wandb\n"}, "server.py:2: imports wandb"),
        ({"plumbing/common/split.py": "from pandas import read_csv\n"}, "plumbing/common/split.py:1"),
    ],
    flowers_insides_are_in_few_places: [
        ({"server.py": "from flwr.server.compat.app import start_grid\n"}, "server.py:1"),
        ({"plumbing/laptop/door.py": "import flwr\nfrom flwr.common import serde\n"}, "plumbing/laptop/door.py:2"),
        ({"client.py": "import flwr.proto.transport_pb2\n"}, "client.py:1"),
    ],
    no_circle: [
        (
            {
                "plumbing/common/a.py": "import os\nfrom plumbing.common import b\n",
                "plumbing/common/b.py": "from plumbing.common.c import f\n",
                "plumbing/common/c.py": "def f():\n    import plumbing.common.a\n",
            },
            "plumbing/common/a.py:2: imports plumbing.common.b",
        )
    ],
}


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_house_keeps_the_rule(rule):
    files = read_files(ROOT)
    assert len(files) > 20
    found = rule(files)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "rule, tree, expected",
    [(rule, *case) for rule, cases in BROKEN.items() for case in cases],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rule_names_what_breaks_it(tmp_path, rule, tree, expected):
    for path, source in {**{f"{name}.py": "" for name in SCRIPTS}, **tree}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
    found = [text for text in rule(read_files(tmp_path)) if text.split(":")[0] in tree]
    assert found and found[0].startswith(expected), found


def test_files_of_tests_are_named_after_what_they_test():
    modules = {module_name(path).rpartition(".")[2] for path in read_files(ROOT)}
    others = {"sources", "structure", "helpers"} | {path.stem.lower() for path in ROOT.glob("*.md")}
    others |= {path.stem for folder in ("deploy", "docs") for path in (ROOT / folder).iterdir()}
    others |= {path.name for path in ROOT.iterdir() if path.is_dir()}
    names = {path.stem[len("test_") :] for path in ROOT.glob("tests/test_*.py")}
    assert not names - modules - others
