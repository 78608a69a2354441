"""What bench.py measures in processes of its own, ours beside the references; run by bench.py, as

    python benchmarks/workers.py NAME [ARGUMENT ...]

Each prints JSON. The references are the bare training loop, the way most tutorials read and train, an empty process
that imports torch and flwr, plain np.save, torch's own Adam, and Flower's own FedAvg. What a reference can do
without is imported in the function that needs it.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from libs import CKPS, DATASETS, nn, np, torch

from common import in_turns, memory_of

NET = "LeNet5"


def alternate(pairs, **works):
    """Time each of `works` in turn, `pairs` times, every other time in reverse order: {name: [seconds, …]}."""
    seconds = {name: [] for name in works}
    for name in in_turns(pairs + 1, list(works)):
        gc.collect()
        started = time.perf_counter()
        works[name]()
        seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}  # the first is for warming up


# ---------------------------------------------------------------------------------------------------------------------
# epoch: an epoch, and a whole fit call.


def bare_epoch(images, labels, model, optimizer):
    """The least that training takes: index, float, forward, backward, step."""
    model.train()
    loss_fn = nn.CrossEntropyLoss()
    for indices in torch.randperm(len(images)).split(32):
        loss = loss_fn(model(images[indices].float() / 255), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class TutorialDataset(torch.utils.data.Dataset):
    """An image is read from its file, resized and divided whenever it is asked for."""

    def __init__(self, df, data_path):
        import cv2

        self.df, self.data_path, self.resize = df, data_path, cv2.resize

    def __len__(self):
        return len(self.df)

    def __getitem__(self, index):
        row = self.df.iloc[index]
        image = np.load(f"{self.data_path}/{row['id']}.npy")
        image = self.resize(image, (32, 32)) / 255
        return torch.tensor(image.transpose(2, 0, 1)).float(), int(row["label"])


def tutorial_pass(loader, model, optimizer=None):
    """A pass with the sums read back after each batch."""
    model.train(optimizer is not None)
    loss_fn = nn.CrossEntropyLoss()
    running_loss, running_hits = 0.0, 0.0
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in loader:
            logits = model(images)
            loss = loss_fn(logits, labels)
            if optimizer is not None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            running_loss += loss.item() * images.size(0)
            running_hits += torch.sum(torch.max(logits, 1)[1] == labels).item()
    return running_loss / len(loader.dataset), running_hits / len(loader.dataset)


def epochs(dataset, pairs):
    """Seconds for the training pass alone and for the whole fit call with eval and checkpoint; ours, bare, tutorial."""
    from plumbing.common.fast import Adam

    import pandas as pd

    from data import load_shard
    from engines import client_fit_fn, run_epoch
    from nets import build_net

    folder = DATASETS / dataset
    loaders, info = load_shard(folder, 0, "cpu")
    table = pd.read_csv(folder / "clients" / "client_0.csv")
    shards = {phase: TutorialDataset(table[table["phase"] == phase], folder / "train") for phase in ("fit", "eval")}
    tutorial = {
        "fit": torch.utils.data.DataLoader(shards["fit"], 32, shuffle=True),
        "eval": torch.utils.data.DataLoader(shards["eval"], 64),
    }
    fit_set = loaders["fit"].dataset
    checkpoint = CKPS / dataset / "bench.ptl"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def fresh(adam=torch.optim.Adam):
        torch.manual_seed(0)
        model = build_net(NET, info["channels"], len(info["classes"]))
        return model, adam(model.parameters(), lr=1e-3)

    def ours_epoch():
        model, optimizer = fresh(Adam)
        run_epoch(loaders["fit"], model, "cpu", optimizer)

    def bare():
        bare_epoch(fit_set.images, fit_set.labels, *fresh())

    def tutorial_epoch():
        tutorial_pass(tutorial["fit"], *fresh())

    def ours_fit():
        client_fit_fn(loaders, fresh(Adam)[0], save_ckp_path=checkpoint)

    def tutorial_fit():
        model, optimizer = fresh()
        tutorial_pass(tutorial["fit"], model, optimizer)
        tutorial_pass(tutorial["eval"], model)
        torch.save(model.state_dict(), checkpoint)

    works = [ours_epoch, bare, tutorial_epoch, ours_fit, tutorial_fit]
    sizes = {"num_fit": len(shards["fit"]), "num_eval": len(shards["eval"])}
    return {**alternate(pairs, **{work.__name__: work for work in works}), **sizes}


def step_profile(dataset):
    """The shares of an epoch's time that torch's operations take by themselves, {name: 0..1}, the greatest first."""
    from plumbing.common.fast import Adam

    from torch.profiler import ProfilerActivity, profile

    from data import load_shard
    from engines import run_epoch
    from nets import build_net

    loaders, info = load_shard(DATASETS / dataset, 0, "cpu")
    model = build_net(NET, info["channels"], len(info["classes"]))
    optimizer = Adam(model.parameters())
    run_epoch(loaders["fit"], model, "cpu", optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run_epoch(loaders["fit"], model, "cpu", optimizer)
    times = {event.key.replace("aten::", ""): event.self_cpu_time_total for event in profiled.key_averages()}
    names = sorted(times, key=times.get, reverse=True)
    return {name: times[name] / sum(times.values()) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# adam: what torch.optim costs a process that trains.


def two_steps(kind):
    """Train two steps with our Adam ("ours") or torch.optim.Adam ("torch"), saying "step" after each."""
    import engines
    from nets import build_net

    model = build_net(NET, 3, 10)
    optimizer = {"ours": engines, "torch": torch.optim}[kind].Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(torch.rand(32, 3, 32, 32)), torch.randint(10, (32,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print("step", flush=True)
    return {"mib": memory_of("self")}


# ---------------------------------------------------------------------------------------------------------------------
# start: what the least client costs.


def bare_client(dataset):
    """Imports, reads a shard's .npy files and trains one bare epoch on it; says "fit" when it is done."""
    import csv

    import flwr.client  # noqa: F401 (a client cannot do without)

    from nets import build_net

    with open(DATASETS / dataset / "clients" / "client_0.csv") as file:
        rows = list(csv.DictReader(file))
    images = {phase: [] for phase in ("fit", "eval")}
    labels = {phase: [] for phase in ("fit", "eval")}
    for row in rows:
        images[row["phase"]].append(np.load(DATASETS / dataset / "train" / f"{row['id']}.npy").transpose(2, 0, 1))
        labels[row["phase"]].append(int(row["label"]))
    images = {phase: torch.from_numpy(np.stack(images[phase])) for phase in images}
    labels = {phase: torch.tensor(labels[phase]) for phase in labels}
    model = build_net(NET, 3, 10)
    bare_epoch(images["fit"], labels["fit"], model, torch.optim.Adam(model.parameters(), lr=1e-3))
    model.eval()
    with torch.no_grad():
        for part in images["eval"].split(64):
            model(part.float() / 255)
    return {"fit": True}


def client_memory(dataset):
    """Where a client's memory is: MiB of its own ("anon") and of files' pages ("file") after each of its stages."""
    from flwr.client import NumPyClient  # noqa: F401

    stages = {}

    def note(name):
        stages[name] = {kind.lower(): memory_of("self", f"Rss{kind}") for kind in ("Anon", "File")}

    note("torch, grpc and flwr imported")
    from plumbing.common.compare import trial

    from client import client_fit_fn, load_shard, run_epoch
    from nets import build_net

    loaders, info = load_shard(DATASETS / dataset, 0, "cpu")
    note("shard read")
    model = build_net(NET, info["channels"], len(info["classes"]))
    trial(model)
    images, labels = next(iter(loaders["fit"]))
    nn.functional.cross_entropy(model(images), labels).backward()
    note("first pass forwards and back")
    client_fit_fn(loaders, model)
    run_epoch(loaders["eval"], model, "cpu")
    note("fit and evaluate")
    shard = sum(loader.dataset.images.nbytes for loader in loaders.values())
    return {"stages": stages, "shard": shard / 2**20}


# ---------------------------------------------------------------------------------------------------------------------
# whole: client.py itself, with the seconds of each fit and evaluate.


def timed_client(*args):
    """Run client.py with `args`; prints {"fit": seconds} or {"evaluate": seconds} after each."""
    from libs import run_script

    import client

    def timed(name, method):
        def call(self, parameters, config):
            started = time.monotonic()
            result = method(self, parameters, config)
            print(json.dumps({name: time.monotonic() - started}), flush=True)
            return result

        return call

    client.Client.fit = timed("fit", client.Client.fit)
    client.Client.evaluate = timed("evaluate", client.Client.evaluate)
    sys.argv = ["client.py", *map(str, args)]
    run_script(client.main)


# ---------------------------------------------------------------------------------------------------------------------
# wifi, wire: server.py as it was before wire.py.


def plain_server(*args):
    """Run server.py with `args`, which sends whole models always, as if no device held any."""
    from libs import run_script
    from plumbing.common.wire import Sender

    import server

    pack = Sender.pack
    Sender.pack = lambda self, model, held: pack(self, model, None)
    sys.argv = ["server.py", *map(str, args)]
    run_script(server.main)


# ---------------------------------------------------------------------------------------------------------------------
# images: writing images.


def save_arrays(archive, folder):
    """Seconds to read the archive, and then to np.save all of its images, one a file."""
    from plumbing.sources.archives import Archive
    from plumbing.sources.cifar import read_cifar

    began = time.perf_counter()
    splits = read_cifar(Archive(Path(archive), None), None).splits
    arrays = {split: [image for image, _ in images] for split, _, images in splits}
    started = time.perf_counter()
    for split, images in arrays.items():
        os.makedirs(f"{folder}/{split}")
        for index, image in enumerate(images):
            np.save(f"{folder}/{split}/{index}.npy", image)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "read_seconds": started - began,
        "images": sum(map(len, arrays.values())),
        "mib": memory_of("self"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# memory: that of N results and their aggregation.


def aggregation_memory(num_clients, pairs):
    """MiB that N results and their aggregation add at the peak, ours and Flower's, each in a forked process."""
    from plumbing.common.state import get_arrays

    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.server import strategy

    import strategies
    from nets import build_net

    torch.manual_seed(0)
    model = build_net(NET, 3, 10)
    arrays = get_arrays(model)
    metrics = dict.fromkeys(strategies.FIT_METRICS, 0.5)
    (CKPS / "bench").mkdir(parents=True, exist_ok=True)

    def aggregate(make):
        averager = make()
        before = memory_of("self", "VmRSS")
        results = [
            (SimpleNamespace(cid=str(cid)), FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), 4000, metrics))
            for cid in range(num_clients)
        ]
        assert averager.aggregate_fit(1, results, [])[0] is not None
        return memory_of("self") - before

    def in_fork(make):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with os.fdopen(writer, "w") as file:
                file.write(str(aggregate(make)))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            answer = file.read()
        os.waitpid(pid, 0)
        return float(answer)

    works = {
        "ours": lambda: strategies.FedAvg(model, CKPS / "bench" / "server.ptl"),
        "flower": lambda: strategy.FedAvg(fit_metrics_aggregation_fn=strategies.metrics_aggregation_fn),
    }
    mib = {name: [] for name in works}
    for name in in_turns(pairs, list(works)):
        mib[name].append(in_fork(works[name]))
    return mib


def parameter_bytes():
    """Bytes of the parameters and buffers of the net that the suite trains."""
    from plumbing.common.state import get_arrays

    from nets import build_net

    return {"bytes": sum(array.nbytes for array in get_arrays(build_net(NET, 3, 10)))}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = [int(text) if text.isdigit() else text for text in sys.argv[2:]]
    print(json.dumps(globals()[sys.argv[1]](*arguments)), flush=True)
