"""A shard's images and labels: from CSV and .npy files into one tensor, and out of it in batches.

load_shard is for client.py and the device's own shard, load_test for server.py and the test set.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from libs import UserError, list_datasets, np, prepare_image, torch
from plumbing.common.split import count_eval, image_digest, read_table, split_id, table_digest

BATCH_SIZES = {"fit": 32, "eval": 64}


def describe_dataset(dataset: str, folder: Path) -> dict:
    """What is known of a dataset, from `folder`/dataset.json if it is there.

    A dictionary: "channels" (int), "classes" ([str, …]); "id" of the cut, "num_clients", "image_size" ([height, width]
    of the files), "shards" (a digest a cid), "test" (a digest), "mean" and "std" (of all training images, a float in
    0..1 a channel), "split" (a list a cid: how many of each class), "sizes" ({cid: (fit images, eval images)}), each
    None where dataset.json does not say; and "images", what nets.predict needs to prepare an image as these were.
    Without the file a name containing MNIST means one channel, any other three, and the classes are the ten digits.
    Raises UserError when dataset.json is not what partition.py writes.
    """
    path = folder / "dataset.json"
    known = ("id", "num_clients", "image_size", "shards", "test", "mean", "std", "split", "fit", "levels")
    info = dict.fromkeys((*known, "eval_fraction"))
    info.update({"channels": 1 if "MNIST" in dataset else 3, "classes": [str(digit) for digit in range(10)]})
    names = [name for name in info if name not in ("fit", "levels", "eval_fraction")]
    sizes = None
    if path.exists():
        try:
            info.update(json.loads(path.read_text(encoding="utf-8")))
            assert info["channels"] in (1, 3) and info["classes"] == [str(name) for name in info["classes"]]
            assert info["id"] is None or (isinstance(info["shards"], list) and isinstance(info["test"], str))
            for name in ("mean", "std"):
                values = info[name]
                assert values is None or len(values) in (1, 3) and all(0 <= value <= 1 for value in values)
            if info["id"] and info["split"] and info["eval_fraction"] is not None:
                evals = [(sum(counts), count_eval(sum(counts), info["eval_fraction"])) for counts in info["split"]]
                sizes = {cid: (total - num_eval, num_eval) for cid, (total, num_eval) in enumerate(evals)}
        except (ValueError, TypeError, AssertionError):
            raise UserError(f"{path} is damaged: run partition.py again") from None
    images = {"image_size": info["image_size"], "fit": info["fit"] or "squash", "levels": info["levels"]}
    return {**{name: info[name] for name in names}, "sizes": sizes, "images": images}


def describe_in_checkpoint(info: dict) -> dict:
    """What a checkpoint says of the data that its net was trained on, from what describe_dataset knows of it."""
    return {"classes": info["classes"], "dataset_id": info["id"], "images": info["images"]}


def read_image(path):
    """Read one .npy image: uint8 H×W or H×W×3. Raises UserError, naming the file, where it is anything else."""
    try:
        with open(path, "rb") as file:
            image = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"image {path} is missing") from None
    except Exception as error:  # whatever numpy makes of bytes that are damaged or something else
        raise UserError(f"image {path} cannot be read: {error}") from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
        raise UserError(f"image {path} is {image.dtype} of shape {image.shape}, not uint8 of H×W or H×W×3")
    return image


class ImageDataset(torch.utils.data.Dataset):
    """The images that `df` lists, read once from `data_path`/<id>.npy and kept in memory.

    `df` has the columns id and label: a DataFrame, or what read_table returns. `images` is uint8 N×C×H×W and `labels`
    int64 N, both on one device; C is 1 for grey images, else 3. Images of another size than `image_size` (height,
    width) are resized to it; `digests` are those of the files as they are. An item is (float32 C×H×W in 0..1, int
    label). Raises UserError for an image that is missing, damaged or unlike the first.
    """

    def __init__(self, df, data_path, image_size=(32, 32)):
        images, self.digests = None, []
        for row, image_id in enumerate(df["id"]):
            path = Path(data_path) / f"{image_id}.npy"
            image = read_image(path)
            self.digests.append(image_digest(image))
            if image.shape[:2] != tuple(image_size):
                image = prepare_image(image, image_size, channels=1 if image.ndim == 2 else 3)
            if images is None:
                images = np.empty((len(df), *image.shape), np.uint8)
            elif image.shape != images.shape[1:]:
                raise UserError(f"image {path} is {'grey' if image.ndim == 2 else 'coloured'}, unlike those before it")
            images[row] = image
        if images is None:
            raise UserError(f"no images are listed for {data_path}")
        images = torch.from_numpy(images)
        self.images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(np.array(df["label"], np.int64))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index].float().div(255), int(self.labels[index])

    def to(self, device):
        """Move the whole shard to `device`, once; batches are then made there. Returns self."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self


class BatchLoader:
    """Batches of an ImageDataset, on its device: (float32 B×C×H×W in 0..1, int64 B), in a new order if `shuffle`.

    Cuts whole batches from the tensor in memory: a DataLoader fetches and collates image by image, which costs about
    as much as LeNet5 does, and copies to the GPU batch by batch. (index_select copies whole images, in a tenth of the
    time that images[indices] takes.) A last batch of one image joins the one before it, for batch norm has nothing to
    go by in a single example.
    """

    def __init__(self, dataset, batch_size, shuffle=False):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __len__(self):
        return len(self.cuts())

    def cuts(self):
        """The sizes of the batches."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        sizes = [self.batch_size] * whole + [rest] * (rest > 0)
        return sizes[:-2] + [self.batch_size + 1] if rest == 1 and whole else sizes

    def __iter__(self):
        images, labels = self.dataset.images, self.dataset.labels
        order = torch.randperm if self.shuffle else torch.arange
        for indices in order(len(images), device=images.device).split(self.cuts()):
            yield images.index_select(0, indices).float().div_(255), labels.index_select(0, indices)


def check_cut(folder, info, path, table, digests, expected, remedy):
    """Raise UserError unless `table`, read from `path`, and its images are of the cut that dataset.json describes.

    `digests` are those of the images, in the table's order; `expected` is the table's own, None in an old dataset.
    """
    if info["id"] is None:
        return
    if split_id(info) != info["id"]:
        raise UserError(f"{folder / 'dataset.json'} is not as partition.py wrote it: {remedy}")
    if table_digest((map(str, row) for row in table), digests) != expected:
        raise UserError(
            f"{path}: its ids, labels or images are of another cut than {folder / 'dataset.json'}: {remedy}"
        )


def check_there(folder, path, remedy):
    """Raise UserError, with the `remedy`, unless there is a dataset in `folder`, with its table `path`."""
    if not folder.is_dir():
        raise UserError(f"no dataset in {folder}{list_datasets(folder.parent)}: {remedy}")
    if not path.exists():
        raise UserError(f"there is no {path}: {remedy}")


def load_shard(folder: Path, cid: int, device, image_size=(32, 32)) -> tuple[dict[str, BatchLoader], dict]:
    """The loaders for a shard, {"fit": BatchLoader, "eval": BatchLoader}, on `device`; and describe_dataset's answer.

    Raises UserError where a file is missing, damaged, or not of the cut that `folder`/dataset.json describes.
    """
    path = folder / "clients" / f"client_{cid}.csv"
    names = [other.stem[len("client_") :] for other in path.parent.glob("client_*.csv")]
    cids = sorted(int(name) for name in names if name.isdecimal())
    if cids and not path.exists():
        raise UserError(f"there is no {path}; --cid can be {', '.join(map(str, cids))}")
    root = shlex.quote(str(folder.parent.parent))
    check_there(folder, path, f"unpack the device's bundle: tar xf client_{cid}.tar -C {root}")
    info = describe_dataset(folder.name, folder)
    table = read_table(path, len(info["classes"]), ("fit", "eval"))
    loaders, digests = {}, {}
    for phase, batch_size in BATCH_SIZES.items():
        shard = ImageDataset(table[table["phase"] == phase], folder / "train", image_size).to(device)
        if shard.images.shape[1] != info["channels"]:
            raise UserError(f"images of {path} have {shard.images.shape[1]} channels, not {info['channels']}")
        digests.update(zip(table["id"][table["phase"] == phase], shard.digests))
        loaders[phase] = BatchLoader(shard, batch_size, shuffle=phase == "fit")
    expected = (info["shards"] or [])[cid : cid + 1]
    remedy = f"unpack the newest bundle of cid {cid} again"
    check_cut(folder, info, path, table, [digests[name] for name in table["id"]], "".join(expected), remedy)
    return loaders, info


def load_test(folder: Path, image_size=(32, 32)) -> tuple[BatchLoader, dict]:
    """The test set as (BatchLoader, describe_dataset's answer), on the CPU. Raises UserError as load_shard does."""
    path = folder / "test.csv"
    check_there(folder, path, f"run partition.py --dataset {folder.name}")
    info = describe_dataset(folder.name, folder)
    table = read_table(path, len(info["classes"]))
    test = ImageDataset(table, folder / "test", image_size)
    if test.images.shape[1] != info["channels"]:
        raise UserError(f"images of {folder / 'test'} have {test.images.shape[1]} channels, not {info['channels']}")
    check_cut(folder, info, path, table, test.digests, info["test"], "run partition.py again")
    return BatchLoader(test, 250), info
