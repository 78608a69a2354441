"""Read images and labels from CSV and .npy files into one tensor, and give them out in batches.

client.py reads its shard by load_shard, server.py the test set by load_test.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from libs import UserError, np, prepare_image, torch
from plumbing.common.split import (
    check_split,
    check_there,
    describe_dataset,
    find_shard,
    image_digest,
    read_table,
    table_digest,
)

BATCH_SIZES = {"fit": 32, "eval": 64, "test": 250}  # of training, and of measuring on a device and on the laptop


def describe_in_checkpoint(info: dict) -> dict:
    """Return what a checkpoint says of the data that its net was trained on, from what describe_dataset returned."""
    about = {"classes": info["classes"], "dataset_id": info["id"], "images": info["images"]}
    return {**about, "partition": info["partition"]}


def read_image(path):
    """Read one .npy image: uint8 H×W or H×W×3. Raises UserError, naming the file, if it is anything else."""
    try:
        with open(path, "rb") as file:
            image = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"image {path} is missing") from None
    except Exception as error:  # of damaged bytes numpy raises anything
        raise UserError(f"image {path} cannot be read: {error}") from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
        raise UserError(f"image {path} is {image.dtype} of shape {image.shape}, not uint8 of H×W or H×W×3")
    return image


class ImageDataset(torch.utils.data.Dataset):
    """The images that `df` lists, read once from `data_path`/<id>.npy and kept in memory.

    `df` has the columns id and label: a DataFrame, or what read_table returns. Images of another size than `image_size`
    (height, width) are resized. An item is (float32 C×H×W in 0..1, int label). Raises UserError if an image is missing,
    damaged or unlike the first.

    `images` is uint8 N×C×H×W and `labels` int64 N, both on one device; C is 1 for grey images, else 3. `digests` are
    those of the files, before they are resized.
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


def batch_sizes(num_images: int, batch_size: int) -> list[int]:
    """Return the number of images of each batch of a pass.

    A last batch of one image joins the one before it: batch norm cannot normalise a single example.
    """
    whole, rest = divmod(num_images, batch_size)
    sizes = [batch_size] * whole + [rest] * (rest > 0)
    return sizes[:-2] + [batch_size + 1] if rest == 1 and whole else sizes


def count_batches(num_images: int) -> int:
    """Return how many batches a device trains on in a pass over so many images."""
    return len(batch_sizes(num_images, BATCH_SIZES["fit"]))


class BatchLoader:
    """Batches of an ImageDataset, on its device: (float32 B×C×H×W in 0..1, int64 B), in a new order if `shuffle`.

    Takes whole batches from the tensor in memory: a DataLoader fetches and collates image by image, which costs about
    as much as LeNet5 does, and copies to the GPU batch by batch. (index_select copies whole images, in a tenth of the
    time that images[indices] takes.)
    """

    def __init__(self, dataset, batch_size, shuffle=False):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __len__(self):
        return len(batch_sizes(len(self.dataset), self.batch_size))

    def __iter__(self):
        order = torch.randperm if self.shuffle else torch.arange
        return self.take(order(len(self.dataset), device=self.dataset.images.device))

    def take(self, order, first=0):
        """Yield the batches of a pass over the images in this `order` (int64 N), from the batch `first` on."""
        images, labels = self.dataset.images, self.dataset.labels
        for indices in order.split(batch_sizes(len(images), self.batch_size))[first:]:
            yield images.index_select(0, indices).float().div_(255), labels.index_select(0, indices)


class Steps:
    """The batches `first_step` to `first_step + num_steps - 1` of endless passes over a BatchLoader's images.

    The order of each pass is a function of `seed`, a sequence of integers of at least 0, and the pass's number alone:
    whoever goes on from the step at which another has stopped takes all images, pass for pass.
    """

    def __init__(self, loader, first_step, num_steps, seed):
        self.loader, self.first_step, self.num_steps, self.seed = loader, first_step, num_steps, seed
        self.dataset = loader.dataset

    def __len__(self):
        return self.num_steps

    def __iter__(self):
        return itertools.islice(self._endless(), self.num_steps)

    def _endless(self):
        first_pass, first = divmod(self.first_step, len(self.loader))
        for number in itertools.count(first_pass):
            sequence = np.random.SeedSequence([*self.seed, number])
            generator = torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))
            order = torch.randperm(len(self.dataset), generator=generator).to(self.dataset.images.device)
            yield from self.loader.take(order, first if number == first_pass else 0)


def load_shard(folder: Path, cid: int, device, image_size=(32, 32)) -> tuple[dict[str, BatchLoader], dict]:
    """Read a shard onto `device`: ({"fit": BatchLoader, "eval": BatchLoader}, what describe_dataset returns).

    Raises UserError if a file is missing, damaged, or not of the split that `folder`/dataset.json describes.
    """
    path, info = find_shard(folder, cid), describe_dataset(folder.name, folder)
    table = read_table(path, len(info["classes"]), ("fit", "eval"))
    loaders, digests = {}, {}
    for phase in ("fit", "eval"):
        rows = table[table["phase"] == phase]
        shard = ImageDataset(rows, folder / "train", image_size).to(device)
        check_channels(shard, info, path)
        digests.update(zip(rows["id"], shard.digests))
        loaders[phase] = BatchLoader(shard, BATCH_SIZES[phase], shuffle=phase == "fit")
    digest = table_digest(table, [digests[name] for name in table["id"]])
    expected = dict(enumerate(info["shards"] or [])).get(cid)
    check_split(info, path, digest, expected, f"unpack the newest bundle of cid {cid} again")
    return loaders, info


def load_test(folder: Path, image_size=(32, 32)) -> tuple[BatchLoader, dict]:
    """Read the test set: (BatchLoader on the CPU, what describe_dataset returns). Raises what load_shard raises."""
    path = folder / "test.csv"
    check_there(path, folder, f"run partition.py --dataset {folder.name}")
    info = describe_dataset(folder.name, folder)
    table = read_table(path, len(info["classes"]))
    test = ImageDataset(table, folder / "test", image_size)
    check_channels(test, info, folder / "test")
    check_split(info, path, table_digest(table, test.digests), info["test"], "run partition.py again")
    return BatchLoader(test, BATCH_SIZES["test"]), info


def check_channels(dataset, info, path):
    """Raise UserError unless the images of `dataset`, which `path` lists, have the channels that `info` says."""
    if dataset.images.shape[1] != info["channels"]:
        raise UserError(f"images of {path} have {dataset.images.shape[1]} channels, not {info['channels']}")
