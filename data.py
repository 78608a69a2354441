"""A shard's images and labels: from CSV and .npy files into one tensor, and out of it in batches.

Used by client.py for the device's own shard and by server.py for the test set.
"""

import csv
import json
from pathlib import Path

from libs import UserError, np, torch


def describe_dataset(dataset, folder):
    """What is known of a dataset: {"channels": int, "classes": [str, …]}, from `folder`/dataset.json if it is there.

    Without that file a name containing MNIST means one channel, any other three, and the classes are the ten digits.
    Raises UserError when the folder is missing, or dataset.json is not what partition.py writes.
    """
    if not folder.is_dir():
        raise UserError(f"no dataset in {folder}: run partition.py, or unpack the device's bundle there")
    path = folder / "dataset.json"
    info = {"channels": 1 if "MNIST" in dataset else 3, "classes": [str(digit) for digit in range(10)]}
    if path.exists():
        try:
            info.update(json.loads(path.read_text(encoding="utf-8")))
            assert info["channels"] in (1, 3) and info["classes"] == [str(name) for name in info["classes"]]
        except (ValueError, TypeError, AssertionError):
            raise UserError(f"{path} is damaged: run partition.py again") from None
    return {"channels": info["channels"], "classes": info["classes"], "num_clients": info.get("num_clients")}


def read_table(path, num_classes, phases=()):
    """Read a CSV with the columns id and label, and phase where `phases` are named, each of which must have rows.

    Returns a structured array with the fields id (str), label (int in 0..num_classes-1) and phase (str). Raises
    UserError, naming file and line, for a missing column, a duplicate id, a label out of range, an unknown or an empty
    phase. (Without pandas, for which a small device has no memory to spare.)
    """
    columns = ["id", "label"] + (["phase"] if phases else [])
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file, strict=True)) or [[]]
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV: {error}") from None
    for column in columns:
        if column not in header:
            raise UserError(f"{path} has no column {column}; it needs {','.join(columns)}")
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} cells, not {len(header)}")
    rows = [tuple(line[header.index(column)] for column in columns) for line in lines]
    table = np.array(rows, [(column, object) for column in columns])
    labels, seen = {str(label): label for label in range(num_classes)}, set()
    for number, row in enumerate(rows, start=2):
        problem = None
        if row[0] in seen:
            problem = f"id {row[0]} stands twice"
        elif row[1] not in labels:
            problem = f"label {row[1]} is not in 0..{num_classes - 1}"
        elif phases and row[2] not in phases:
            problem = f"phase {row[2]} is not one of {', '.join(phases)}"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        seen.add(row[0])
    for phase in phases:
        if not (table["phase"] == phase).any():
            raise UserError(f"{path} has no row of phase {phase}")
    if not rows:
        raise UserError(f"{path} has no rows")
    table["label"] = [labels[label] for label in table["label"]]
    return table


def read_image(path, image_size):
    """Read one .npy image: uint8 H×W or H×W×3, resized to `image_size` (height, width) where it differs."""
    try:
        with open(path, "rb") as file:
            image = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"image {path} is missing") from None
    except Exception as error:  # whatever numpy makes of bytes that are damaged or something else
        raise UserError(f"image {path} cannot be read: {error}") from None
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
        raise UserError(f"image {path} is {image.dtype} of shape {image.shape}, not uint8 of H×W or H×W×3")
    if image.shape[:2] != tuple(image_size):
        from libs import cv2  # here: 15 MB that most devices get by without

        image = cv2.resize(image, (image_size[1], image_size[0]), interpolation=cv2.INTER_AREA)
    return image


class ImageDataset(torch.utils.data.Dataset):
    """The images that `df` lists, read once from `data_path`/<id>.npy and kept in memory.

    `df` has the columns id and label: a DataFrame, or what read_table returns. `images` is uint8 N×C×H×W and `labels`
    int64 N, both on one device; C is 1 for grey images, else 3. An item is (float32 C×H×W in 0..1, int label). Raises
    UserError for an image that is missing, damaged or unlike the first.
    """

    def __init__(self, df, data_path, image_size=(32, 32)):
        images = None
        for row, image_id in enumerate(df["id"]):
            path = Path(data_path) / f"{image_id}.npy"
            image = read_image(path, image_size)
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
    as much as LeNet5 does, and copies to the GPU batch by batch.
    """

    def __init__(self, dataset, batch_size, shuffle=False):
        self.dataset, self.batch_size, self.shuffle = dataset, batch_size, shuffle

    def __len__(self):
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self):
        images, labels = self.dataset.images, self.dataset.labels
        order = torch.randperm if self.shuffle else torch.arange
        for indices in order(len(images), device=images.device).split(self.batch_size):
            yield images[indices].float().div_(255), labels[indices]
