"""CIFAR-10's and CIFAR-100's own files, packed or not."""

import pickle

from plumbing.common.process import UserError
from plumbing.sources.archives import Archive
from plumbing.sources.source import Options, Source

import numpy as np

LAYOUTS = {  # name: (training files, test file, file with the names, their key, the labels' key)
    "CIFAR-10": ([f"data_batch_{k}" for k in range(1, 6)], "test_batch", "batches.meta", b"label_names", b"labels"),
    "CIFAR-100": (["train"], "test", "meta", b"fine_label_names", b"fine_labels"),
}


class PlainUnpickler(pickle.Unpickler):
    """Loads numpy arrays and plain types only, so that an archive cannot run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how Python 3 pickles bytes
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def read_cifar(archive: Archive, options: Options) -> Source | None:
    """Read CIFAR-10's or CIFAR-100's files, with fine labels, without unpacking anything to disk."""
    batches = load_batches(archive)
    layout = next((layout for layout in LAYOUTS if layout in batches), None)
    if layout is None:
        return None
    batches = batches[layout]
    train, test, meta, classes_key, labels_key = LAYOUTS[layout]
    try:
        classes = [name.decode() for name in batches[meta][classes_key]]
        for name in (*train, test):
            data, labels = batches[name][b"data"], np.array(batches[name][labels_key])
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
                raise ValueError(f"{name} does not hold rows of 3,072 bytes with a label each")
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{name} has a label outside 0..{len(classes) - 1}")
            batches[name] = data, labels
    except KeyError as error:
        raise UserError(f"{archive} is incomplete: {error.args[0]!r} of {layout} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:  # pickles of something else
        raise UserError(f"{archive} is damaged, or not {layout}: {error}") from None

    def images(names):
        for name in names:
            data, labels = batches.pop(name)
            yield from zip(np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.tolist())

    num_train, num_test = (sum(len(batches[name][1]) for name in names) for names in (train, [test]))
    return Source(classes, [("train", num_train, images(train)), ("test", num_test, images([test]))], channels=3)


def load_batches(archive):
    """Load all files that are named as CIFAR's: {layout: {name: what the pickle holds}}."""
    layout_of = {name: layout for layout, (train, *others) in LAYOUTS.items() for name in (*train, *others[:2])}
    batches = {}
    for name, opened in archive.files.items():
        name = name.rpartition("/")[2]
        if name in layout_of:
            try:
                with opened() as file:
                    if layout_of[name] == "CIFAR-100" and file.peek(1)[:1] != b"\x80":
                        continue  # not a pickle: "train", "test" and "meta" are common names
                    batch = PlainUnpickler(file, encoding="bytes").load()
            except Exception as error:  # reading and unpickling damaged bytes can raise anything
                raise UserError(f"{archive}: {name} is damaged, or not {layout_of[name]}: {error}") from None
            batches.setdefault(layout_of[name], {})[name] = batch
    return batches
