"""CIFAR-10's and CIFAR-100's own files."""

from __future__ import annotations

import pickle

from plumbing.common.process import UserError
from plumbing.sources.archives import list_members

import numpy as np


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain types only, so that an archive cannot run code."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how Python 3 pickles bytes
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ADMITTED[module, name]


CIFAR_LAYOUTS = {  # name: (training files, test file, file with the names, their key, the labels' key)
    "CIFAR-10": ([f"data_batch_{k}" for k in range(1, 6)], "test_batch", "batches.meta", b"label_names", b"labels"),
    "CIFAR-100": (["train"], "test", "meta", b"fine_label_names", b"fine_labels"),
}


def read_cifar(source, args):
    """Read CIFAR-10's or CIFAR-100's layout (fine labels); None where none of it is there. Unpacks nothing to disk."""
    batches = {}
    layout_of = {name: key for key, (train, *others) in CIFAR_LAYOUTS.items() for name in (*train, *others[:2])}
    for name, opened in list_members(source):
        name = name.rpartition("/")[2]
        if name in layout_of:
            with opened() as file:
                if layout_of[name] == "CIFAR-100" and file.peek(1)[:1] != b"\x80":
                    continue  # something else with that plain name, and no pickle
                try:
                    batches[name] = PlainUnpickler(file, encoding="bytes").load()
                except Exception as error:  # whatever pickle makes of bytes that are damaged or something else
                    raise UserError(f"{source}: {name} is damaged, or not {layout_of[name]}'s: {error}") from None
    layout = next((key for key in CIFAR_LAYOUTS if any(layout_of[name] == key for name in batches)), None)
    if layout is None:
        return None
    train, test, meta, classes_key, labels_key = CIFAR_LAYOUTS[layout]
    try:
        classes = [name.decode() for name in batches[meta][classes_key]]
        for name in (*train, test):
            data, labels = batches[name][b"data"], np.array(batches[name][labels_key])
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
                raise ValueError(f"{name} is not rows of 3,072 bytes with a label each")
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{name} has a label outside 0..{len(classes) - 1}")
            batches[name] = data, labels
    except KeyError as error:
        raise UserError(f"{source} is not whole: of {layout}'s layout it lacks {error.args[0]!r}") from None
    except (ValueError, TypeError, AttributeError) as error:  # pickles of something else
        raise UserError(f"{source} is damaged, or not in {layout}'s layout: {error}") from None

    def images(names):
        for name in names:
            data, labels = batches.pop(name)
            yield from zip(np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.tolist())

    num_train = sum(len(batches[name][1]) for name in train)
    splits = [("train", num_train, images(train)), ("test", len(batches[test][1]), images([test]))]
    return classes, 3, splits, None
