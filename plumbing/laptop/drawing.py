"""How a picture is drawn and saved: its letters, its formats, and that it never ends a run."""

import contextlib
import functools
import re
from collections.abc import Callable
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import printable, say

FORMATS = ("png", "pdf", "svg")  # of --picture_format
FONT = "DejaVu Sans"  # which matplotlib brings


def plain(text, limit: int = 120) -> str:
    """Return a text for matplotlib, to which dollars are a formula, and a label that begins with "_" is hidden."""
    return re.sub("^_", " _", printable(text, limit)).replace("$", r"\$")


@functools.cache
def fonts_for(letters: frozenset) -> tuple[list[str], set[str]]:
    """Return (names of installed fonts that together have the `letters`, those letters that none can draw)."""
    from matplotlib import font_manager

    def unlikeness(entry):
        return entry.name != FONT, entry.style != "normal", entry.weight != 400

    fonts, missing = [FONT], set(letters)
    for entry in sorted(font_manager.fontManager.ttflist, key=unlikeness):
        if missing and not entry.name.startswith("Last Resort"):  # which draws boxes for all letters
            with contextlib.suppress(OSError, RuntimeError):  # a font of bitmaps, such as one of emojis
                font = font_manager.get_font(entry.fname)
                font.set_size(10, 72)
                found = {letter for letter in missing if font.get_char_index(ord(letter))}
                for letter in found:
                    font.load_char(ord(letter))
                fonts += [entry.name] if found else []
                missing -= found
    return list(dict.fromkeys(fonts)), missing


@functools.cache
def name_classes(classes: tuple, limit: int) -> list[str]:
    """Return the names of `classes` for a picture. A name with letters that no font has becomes the class's number."""
    names = [plain(name, limit) for name in classes]
    _, missing = fonts_for(frozenset("".join(names)))
    numbers = [number for number, name in enumerate(names) if missing & set(name)]
    if numbers:
        some = ", ".join(f"{number} for {printable(classes[number], limit)}" for number in numbers[:5])
        more = ", …" * (len(numbers) > 5)
        say(f"note: no font here has all letters of some classes; pictures show their numbers: {some}{more}")
    return [str(number) if number in numbers else name for number, name in enumerate(names)]


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], title: str, names=()):
    """Give a figure of matplotlib, `size` in inches, to draw on; `names` are texts on it that users chose.

    When the block ends, it becomes the file `path`, and a PNG beside that if `path` has another of the FORMATS. Those
    of an earlier run in a third one are removed: nobody would draw them again.
    """
    import matplotlib
    from matplotlib.figure import Figure  # half a second that nothing else needs

    title = "\n".join(plain(line, 200) for line in title.split("\n"))
    fonts, missing = fonts_for(frozenset("".join([title, *names])))
    with matplotlib.rc_context({"font.family": fonts}):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle("".join("?" if letter in missing - {"\n"} else letter for letter in title), wrap=True)
        yield figure
        for kind in FORMATS:
            if kind in ("png", path.suffix[1:]):
                with atomic_write(path.with_suffix(f".{kind}")) as part:
                    figure.savefig(part, format=kind, dpi=110)
            else:
                path.with_suffix(f".{kind}").unlink(missing_ok=True)


def try_to_draw(draw: Callable, *args) -> None:
    """Call `draw(*args)`, which draws a picture. If it fails, only print that: no run ends because of a picture."""
    try:
        draw(*args)
    except Exception as error:
        say(f"warning: {draw.__name__} failed, so its picture is missing: {printable(error)}")
