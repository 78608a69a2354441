"""data, nets and engines, each compared with numpy, OpenCV and plain torch."""

import io
import os
import pickle
import resource
import stat
import zipfile

from libs import UserError
from plumbing.common import compare
from plumbing.common.files import atomic_write

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import client
import nets
from data import BatchLoader, ImageDataset
from engines import client_fit_fn, server_test_fn
from nets import LeNet5

# ---------------------------------------------------------------------------------------------------------------------
# ImageDataset and BatchLoader.


def write_shard(folder, images, labels=None):
    """Write `images` as .npy files with ids that are no row numbers; the table that lists them."""
    ids = [f"{7 * index + 3}" for index in range(len(images))]
    for image_id, image in zip(ids, images):
        np.save(folder / f"{image_id}.npy", image)
    return pd.DataFrame({"id": ids, "label": range(len(images)) if labels is None else labels})


def random_images(count, *shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, *shape)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32)], ids=["colour", "grey"])
def test_items_are_the_files_divided_by_255(tmp_path, shape):
    ramp = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)  # all 256 values, each place its own
    table = write_shard(tmp_path, [ramp, ramp[::-1], *random_images(3, *shape)], labels=[4, 0, 9, 4, 1])
    dataset = ImageDataset(table, tmp_path)
    assert len(dataset) == 5
    for row, (image, label) in zip(table.itertuples(), (dataset[index] for index in range(5))):
        expected = np.load(tmp_path / f"{row.id}.npy") / np.float32(255)
        expected = expected.transpose(2, 0, 1) if expected.ndim == 3 else expected[None]
        assert image.dtype == torch.float32 and type(label) is int
        assert np.array_equal(image.numpy(), expected) and label == row.label
    assert dataset[0][0].min() == 0 and dataset[0][0].max() == 1


@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
def test_images_are_resized_only_where_they_differ(tmp_path, image_size):
    sizes = [(32, 32), (24, 40), (40, 24), (64, 50), (13, 17), (1, 1)]
    images = [random_images(1, *size, 3)[0] for size in sizes]
    table = write_shard(tmp_path, images)
    dataset = ImageDataset(table, tmp_path, image_size)
    for index, image in enumerate(images):
        if image.shape[:2] != image_size:
            image = cv2.resize(image, image_size[::-1], interpolation=cv2.INTER_AREA)
        assert np.array_equal(dataset[index][0].numpy(), image.transpose(2, 0, 1) / np.float32(255))


def test_images_are_kept_as_bytes(tmp_path):
    dataset = ImageDataset(write_shard(tmp_path, random_images(4, 32, 32, 3)), tmp_path)
    tensors = [value for value in vars(dataset).values() if torch.is_tensor(value)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= 4 * (3072 + 8)


@pytest.mark.parametrize("shape", [(32, 32, 3), (32, 32)], ids=["colour", "grey"])
def test_batches_are_those_of_torchs_own_loader(tmp_path, shape):
    dataset = ImageDataset(write_shard(tmp_path, random_images(20, *shape)), tmp_path)
    theirs = list(torch.utils.data.DataLoader(dataset, batch_size=8))
    ours = list(BatchLoader(dataset, 8))
    assert len(ours) == len(theirs) == len(BatchLoader(dataset, 8)) == 3
    for (images, labels), (their_images, their_labels) in zip(ours, theirs):
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        assert torch.equal(images, their_images) and torch.equal(labels, their_labels)
    assert [len(labels) for _, labels in ours] == [8, 8, 4]


def test_shuffle_takes_each_image_once_with_its_label_in_a_new_order(tmp_path):
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((32, 32, 3), np.uint8)  # filled by label
    loader = BatchLoader(ImageDataset(write_shard(tmp_path, images), tmp_path), 32, shuffle=True)
    orders = []
    for _ in range(3):
        batches = list(loader)
        labels = torch.cat([labels for _, labels in batches])
        pixels = torch.cat([images for images, _ in batches])[:, 1, 5, 9]
        assert torch.equal((pixels * 255).round().long(), labels)
        assert sorted(labels.tolist()) == list(range(100))
        orders.append(tuple(labels.tolist()))
    assert len({*orders, tuple(range(100))}) == 4
    torch.manual_seed(5)
    first = [labels.tolist() for _, labels in loader]
    torch.manual_seed(5)
    assert [labels.tolist() for _, labels in loader] == first


@pytest.mark.parametrize(
    "count, sizes",
    [(1, [1]), (2, [2]), (31, [31]), (32, [32]), (33, [33]), (34, [32, 2]), (64, [32, 32]), (65, [32, 33])],
)
@pytest.mark.parametrize("shuffle", [False, True])
def test_last_batch_of_one_joins_the_one_before(tmp_path, count, sizes, shuffle):
    dataset = ImageDataset(write_shard(tmp_path, random_images(count, 32, 32)), tmp_path)
    loader = BatchLoader(dataset, 32, shuffle)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [len(images) for images, _ in batches] == sizes
    assert len(loader) == len(batches)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(count))


@pytest.mark.parametrize("count", [33, 65])
def test_net_with_batch_norm_over_single_values_trains_on_any_shard(tmp_path, count):
    """As plain torch does, given the same batches; on one image alone torch itself refuses."""

    def net():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(1024, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )

    with pytest.raises(ValueError, match="more than 1 value"):
        net()(torch.rand(1, 1, 32, 32))
    images = random_images(count, 32, 32)
    dataset = ImageDataset(write_shard(tmp_path, images, labels=np.arange(count) % 3), tmp_path)
    model, plain = net(), net()
    loaders = {"fit": BatchLoader(dataset, 32), "eval": BatchLoader(dataset, 64)}
    metrics = client_fit_fn(loaders, model, num_epochs=2)
    pixels, labels = torch.tensor(images)[:, None] / 255, torch.arange(count) % 3
    starts = list(range(0, count - 1, 32))
    cuts = [slice(start, end) for start, end in zip(starts, [*starts[1:], count])]
    fit = [(pixels[cut], labels[cut]) for cut in cuts]
    fit_loss, fit_accuracy = plain_fit(plain, fit, 2, 1e-3)
    assert metrics["fit_loss"] == pytest.approx(fit_loss, rel=1e-5)
    assert metrics["fit_accuracy"] == pytest.approx(fit_accuracy, rel=1e-5)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


def test_to_moves_the_shard_and_gives_it_back(tmp_path):
    dataset = ImageDataset(write_shard(tmp_path, random_images(4, 32, 32, 3)), tmp_path)
    before = [(image.clone(), label) for image, label in (dataset[index] for index in range(4))]
    assert dataset.to(torch.device("cpu")) is dataset
    assert all(torch.equal(dataset[index][0], image) for index, (image, _) in enumerate(before))
    assert dataset.to("meta") is dataset  # a device that is not the CPU, everywhere
    assert {tensor.device.type for batch in BatchLoader(dataset, 2) for tensor in batch} == {"meta"}


# ---------------------------------------------------------------------------------------------------------------------
# LeNet5 and its checkpoint.

SHAPES = {
    "layer1.0.weight": (6, 3, 5, 5),
    "layer1.0.bias": (6,),
    "layer1.1.weight": (6,),
    "layer1.1.bias": (6,),
    "layer1.1.running_mean": (6,),
    "layer1.1.running_var": (6,),
    "layer1.1.num_batches_tracked": (),
    "layer2.0.weight": (16, 6, 5, 5),
    "layer2.0.bias": (16,),
    "layer2.1.weight": (16,),
    "layer2.1.bias": (16,),
    "layer2.1.running_mean": (16,),
    "layer2.1.running_var": (16,),
    "layer2.1.num_batches_tracked": (),
    "layer3.0.weight": (120, 400),
    "layer3.0.bias": (120,),
    "layer3.2.weight": (84, 120),
    "layer3.2.bias": (84,),
    "classifier.weight": (10, 84),
    "classifier.bias": (10,),
}


def trained_net(*args):
    """A LeNet5 whose batch norms have seen something."""
    torch.manual_seed(1)
    model = LeNet5(*args)
    for _ in range(3):
        model(torch.rand(8, args[0], 32, 32))
    return model.eval()


def plain_lenet5(state, images, training):
    """LeNet5 as the contract words it, written out: logits, without any module."""
    out = images
    for layer in ("layer1", "layer2"):
        out = F.conv2d(out, state[f"{layer}.0.weight"], state[f"{layer}.0.bias"])
        if training:
            mean, var = out.mean((0, 2, 3)), out.var((0, 2, 3), unbiased=False)
        else:
            mean, var = state[f"{layer}.1.running_mean"], state[f"{layer}.1.running_var"]
        scale = state[f"{layer}.1.weight"] / (var + 1e-5).sqrt()
        out = (out - mean[:, None, None]) * scale[:, None, None] + state[f"{layer}.1.bias"][:, None, None]
        out = F.max_pool2d(out.clamp(min=0), 2)
    out = out.reshape(len(out), 400)
    for layer in ("layer3.0", "layer3.2"):
        out = (out @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]).clamp(min=0)
    return out @ state["classifier.weight"].T + state["classifier.bias"]


def test_state_dict_of_lenet5():
    model = LeNet5(3, 10)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == SHAPES
    assert list(model.state_dict()) == list(SHAPES)  # the order in which the parameters travel
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 62050


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("in_channels, num_classes", [(3, 10), (1, 7)])
def test_lenet5_computes_what_the_contract_says(in_channels, num_classes, training):
    model = trained_net(in_channels, num_classes)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(5, in_channels, 32, 32)
    with torch.no_grad():
        logits = model.train(training)(images)
        torch.testing.assert_close(logits, plain_lenet5(state, images, training))
    assert logits.shape == (5, num_classes)


def test_checkpoint_describes_itself_and_gives_the_net_back(tmp_path):
    path = tmp_path / "net.ptl"
    model = trained_net(1, 7)
    about = {"classes": list("abcdefg"), "dataset": "MNIST", "round": 3, "metrics": {"fit_loss": 0.5}}
    nets.save_checkpoint(path, model, {**about, "wandb_run_id": "x1", "args": {"lr": 1e-3}})
    assert [child.name for child in tmp_path.iterdir()] == ["net.ptl"]
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint.pop("model")
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert checkpoint == {
        **about,
        "net": "LeNet5",
        "in_channels": 1,
        "num_classes": 7,
        "wandb_run_id": "x1",
        "args": {"lr": 1e-3},
    }
    loaded, _ = nets.load_checkpoint(path)
    images = torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images)) and not loaded.training


def test_no_flipped_bit_is_loaded(tmp_path):
    path, saved = tmp_path / "saved.ptl", {"round": 3, "model": {"weight": torch.arange(40.0)}}
    torch.save(saved, path)
    whole, damaged = path.read_bytes(), 0
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        try:
            read = nets.read_saved(path)
            assert read["round"] == 3 and read["model"]["weight"].equal(saved["model"]["weight"])
        except ValueError:
            damaged += 1
    assert damaged > 160


@pytest.mark.parametrize(
    "kind", ["text", "empty", "pickle", "zip", "cut", "tensor", "state", "other", "gone", "channels"]
)
def test_what_is_no_checkpoint_is_a_value_error(tmp_path, kind):
    path, model = tmp_path / "net.ptl", LeNet5(3, 10)
    nets.save_checkpoint(path, model)
    contents = {"text": b"no checkpoint", "empty": b"", "pickle": pickle.dumps({"net": "LeNet5"})}
    saved = {"tensor": torch.zeros(3), "state": model.state_dict(), "gone": {**torch.load(path), "net": "Gone"}}
    saved["other"] = {**torch.load(path), "num_classes": 11}
    saved["channels"] = {**torch.load(path), "in_channels": "three"}
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind in contents:
        path.write_bytes(contents[kind])
    else:
        torch.save(saved[kind], path)
    with pytest.raises(ValueError, match="^it"):
        nets.load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        nets.load_checkpoint(tmp_path / "not there")


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "net.ptl"
    nets.save_checkpoint(path, trained_net(3, 10), {"round": 1})
    before = path.read_bytes()

    def disk_full(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError):
        nets.save_checkpoint(path, LeNet5(3, 10), {"round": 2})
    assert [child.name for child in tmp_path.iterdir()] == ["net.ptl"] and path.read_bytes() == before


def test_full_disk_is_an_os_error_at_any_size(tmp_path, capsys):
    """A limit on the size of a file stands for the full disk. torch's own writer raises RuntimeErrors there."""
    path, own = tmp_path / "net.ptl", client.OwnBatchNorm(tmp_path / "net.bn")
    own.kept, model, limits = {}, LeNet5(3, 10), resource.getrlimit(resource.RLIMIT_FSIZE)
    nets.save_checkpoint(path, model)
    before = path.read_bytes()
    try:
        for size in range(0, len(before), len(before) // 12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError):
                nets.save_checkpoint(path, model)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        own.keep(model, "a run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in capsys.readouterr().out
    assert [child.name for child in tmp_path.iterdir()] == ["net.ptl"] and path.read_bytes() == before


def test_name_is_on_the_disk_after_what_it_names(tmp_path, monkeypatch):
    def noted(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (done.append(what(*args)), real(*args)))

    done = []
    noted(os, "fsync", lambda fd: "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
    noted(os, "replace", lambda *paths: "rename")
    with atomic_write(tmp_path / "a") as part:
        part.write_text("a")
    assert done == ["file", "rename", "folder"]


def test_parameters_travel_in_the_order_of_the_state_dict():
    model, other = trained_net(3, 10), LeNet5(3, 10)
    arrays = nets.get_arrays(model)
    assert [array.shape for array in arrays] == list(SHAPES.values())
    nets.set_arrays(other, arrays)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    arrays[0][:] = 0  # a copy: the net it came from is as it was
    assert model.state_dict()["layer1.0.weight"].abs().sum() > 0
    for wrong in (arrays[:-1], arrays[:-1] + [np.zeros(11)], [*arrays, np.zeros(1)]):
        with pytest.raises(ValueError):
            nets.set_arrays(LeNet5(3, 10), wrong)


def test_fingerprint_is_of_the_shapes_and_not_of_the_values():
    first = compare.fingerprint(LeNet5(3, 10))
    assert first == compare.fingerprint(trained_net(3, 10))
    others = [LeNet5(1, 10), LeNet5(3, 11), LeNet5(3, 10).double(), nn.Sequential(*LeNet5(3, 10).children())]
    assert len({first, *map(compare.fingerprint, others)}) == 5


# ---------------------------------------------------------------------------------------------------------------------
# predict.


@pytest.fixture(params=[1, 3])
def predictor(request):
    """Takes an image: the probabilities that a random net with so many channels gives, a list."""
    torch.manual_seed(1)
    model = LeNet5(request.param, 4).eval()
    return lambda image: list(nets.predict(model, {}, image)[1].values())


def as_pil(mode):
    values = random_images(1, 40, 50, 4, seed=5)[0].copy()
    if mode == "I;16":
        return Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    if mode in ("1", "P"):
        return Image.fromarray(values[:, :, :3]).convert(mode)
    return Image.fromarray(
        values.squeeze() if mode == "RGBA" else values[:, :, : {"L": 1, "LA": 2, "RGB": 3}[mode]].squeeze()
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_image_is_the_same_by_path_bytes_file_and_pil(predictor, tmp_path, mode):
    image, path = as_pil(mode), tmp_path / "image.png"
    assert image.mode == mode
    image.save(path)
    expected = predictor(path)
    with open(path, "rb") as file:
        for kind in (str(path), path.read_bytes(), bytearray(path.read_bytes()), file, image, Image.open(path)):
            assert predictor(kind) == expected, kind
    if mode in ("L", "RGB", "RGBA", "I;16"):
        array = np.array(image)
        assert predictor(array) == expected
        assert predictor(array.astype(array.dtype.newbyteorder(">"))) == expected
        assert predictor(np.asfortranarray(array)) == expected
        if array.ndim == 2:
            assert predictor(array[:, :, None]) == expected


def test_pil_image_is_turned_as_its_file_is(predictor, tmp_path):
    path, exif = tmp_path / "photo.png", Image.Exif()
    exif[274] = 6  # Orientation
    as_pil("RGB").save(path, exif=exif)
    assert predictor(Image.open(path)) == predictor(path) != predictor(as_pil("RGB"))


@pytest.mark.parametrize(
    "image, reason",
    [
        (np.zeros((32, 32), np.float32), "uint8 or uint16, not float32"),
        (np.zeros((32, 32), bool), "uint8 or uint16, not bool"),
        (np.zeros((32, 32), np.int64), "uint8 or uint16, not int64"),
        (np.zeros((32, 32), np.uint32), "uint8 or uint16, not uint32"),
        (np.zeros((3, 32, 32), np.uint8), "not 3×32×32"),
        (np.zeros((1, 32, 32, 3), np.uint8), "not 1×32×32×3"),
        (np.zeros(32, np.uint8), "not 32"),
        (np.zeros((32, 32, 2), np.uint8), "not 32×32×2"),
        (np.zeros((0, 32, 3), np.uint8), "not 0×32×3"),
        (torch.zeros(3, 32, 32), "no image can be made of a Tensor"),
        ([[0, 255]], "no image can be made of a list"),
        (None, "no image can be made of a NoneType"),
        (io.StringIO("text"), "no image can be made of a StringIO"),
        (b"no image", "image bytes cannot be read"),
        (b"", "image bytes cannot be read"),
        ("no/such.png", "image no/such.png cannot be read"),
        (Image.new("CMYK", (32, 32)), "a PIL image cannot be of mode CMYK"),
        (Image.new("F", (32, 32)), "a PIL image cannot be of mode F"),
    ],
)
def test_what_is_no_image_is_refused_in_words(image, reason):
    with pytest.raises(UserError, match=reason):
        nets.predict(LeNet5(3, 4), {}, image)


# ---------------------------------------------------------------------------------------------------------------------
# engines, with lists of batches as loaders.


def batches(*sizes, seed=0):
    torch.manual_seed(seed)
    return [(torch.rand(size, 3, 32, 32), torch.randint(10, (size,))) for size in sizes]


def plain_test(model, loader):
    """Mean loss and accuracy over all images at once."""
    images, labels = (torch.cat(tensors) for tensors in zip(*loader))
    model.eval()
    with torch.no_grad():
        logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def plain_fit(model, loader, num_epochs, lr):
    """The loop that every tutorial has; mean loss and accuracy of the last epoch, over images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(num_epochs):
        model.train()
        loss_sum = hits = count = 0
        for images, labels in loader:
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(labels)
            hits += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss_sum / count, hits / count


FIT, EVAL = batches(32, 32, 10), batches(64, 7, seed=1)


@pytest.mark.parametrize("kwargs", [{}, {"num_epochs": 2}, {"num_epochs": 2, "lr": 0.01}])
def test_client_fit_fn_is_a_plain_training_loop(kwargs):
    """In float64: a bias in front of batch norm has no gradient, and in float32 Adam follows what rounding leaves."""
    fit, evaluation = ([(images.double(), labels) for images, labels in loader] for loader in (FIT, EVAL))
    model, plain = trained_net(3, 10).double(), trained_net(3, 10).double()
    metrics = client_fit_fn({"fit": fit, "eval": evaluation}, model, **kwargs)
    fit_loss, fit_accuracy = plain_fit(plain, fit, kwargs.get("num_epochs", 1), kwargs.get("lr", 1e-3))
    eval_loss, eval_accuracy = plain_test(plain, evaluation)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
    assert metrics == pytest.approx(
        {"fit_loss": fit_loss, "fit_accuracy": fit_accuracy, "eval_loss": eval_loss, "eval_accuracy": eval_accuracy},
        rel=1e-5,
    )
    assert {type(value) for value in metrics.values()} == {float}


def test_each_epoch_trains_in_train_mode_and_evaluation_does_not():
    model, modes = trained_net(3, 10), []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    client_fit_fn({"fit": FIT, "eval": EVAL}, model, num_epochs=3)
    client_fit_fn({"fit": FIT, "eval": EVAL}, model)
    train, test = (True, True), (False, False)
    assert modes == [train] * 9 + [test] * 2 + [train] * 3 + [test] * 2


@pytest.mark.parametrize("training", [False, True])
def test_server_test_fn_is_a_plain_test_and_changes_nothing(training):
    model = trained_net(3, 10).train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = server_test_fn({"test": EVAL}, model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    loss, accuracy = plain_test(model, EVAL)
    assert metrics == pytest.approx({"test_loss": loss, "test_accuracy": accuracy}, rel=1e-5)


def test_engines_take_any_net():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    before = plain_test(model, FIT)[0]
    client_fit_fn({"fit": FIT, "eval": EVAL}, model, num_epochs=5)
    assert plain_test(model, FIT)[0] < before
    assert server_test_fn({"test": EVAL}, model)["test_loss"] == pytest.approx(plain_test(model, EVAL)[0], rel=1e-5)


def test_client_fit_fn_leaves_a_checkpoint_of_the_trained_net(tmp_path):
    model, path = trained_net(3, 10), tmp_path / "client_0.ptl"
    about = {"dataset": "Tiny", "round": 4, "classes": list("abcdefghij")}
    metrics = client_fit_fn({"fit": FIT, "eval": EVAL}, model, save_ckp_path=path, about=about)
    checkpoint = torch.load(path, weights_only=True)
    assert {name: checkpoint[name] for name in about} == about and checkpoint["metrics"] == metrics
    assert all(torch.equal(checkpoint["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert [child.name for child in tmp_path.iterdir()] == ["client_0.ptl"]
