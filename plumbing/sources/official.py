"""The official files of well-known datasets, and their download."""

import hashlib
import http.client
import queue
import sys
import threading
import urllib.request
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import UserError
from plumbing.sources.archives import file_md5

from tqdm import tqdm

OFFICIAL = {  # dataset: (where its files are, {file: MD5})
    "CIFAR10": ("https://www.cs.toronto.edu/~kriz", {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "CIFAR100": ("https://www.cs.toronto.edu/~kriz", {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}),
    "MNIST": (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "FashionMNIST": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}


START_TIMEOUT = 10  # seconds until a download must have started
STALL_TIMEOUT = 30  # seconds without data until a download has failed


def download(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`, which exists only once it is complete and its MD5 is right. Raises UserError."""
    answers = queue.Queue()

    def start():  # in a thread, as no timeout limits the look-up of a host's name
        try:
            answers.put(urllib.request.urlopen(url, timeout=STALL_TIMEOUT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=start, daemon=True).start()
    try:
        response = answers.get(timeout=START_TIMEOUT)
    except queue.Empty:
        response = f"no answer within {START_TIMEOUT} s"
    if isinstance(response, (str, Exception)):
        raise UserError(
            f"cannot download {url} ({response}): put the file into {path.parent}/ by hand, or read images that you "
            "have (--source FILE), or train on drawn ones (--dataset Shapes10)"
        ) from None
    digest = hashlib.md5()
    try:
        total = int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=path.name, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
        with atomic_write(path) as part:
            with response, bar, open(part, "wb") as file:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != md5:
                raise UserError(f"{url} arrived incomplete or damaged (wrong MD5): run this again")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"the download of {url} failed ({error}): run this again") from None


def find_official(dataset: str, datasets: Path) -> Path:
    """Return the official archive of `dataset` in `datasets`, or the folder of its files; download what is missing."""
    url, files = OFFICIAL[dataset]
    folder = datasets if len(files) == 1 else datasets / f"{dataset}-idx"
    folder.mkdir(exist_ok=True)
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            download(f"{url}/{name}", path, md5)
        elif file_md5(path) != md5:
            raise UserError(f"{path} is not the official file (wrong MD5): delete it, or use it with --source")
    return path if len(files) == 1 else folder
