"""The flags of a run's results, and all flags as --resume and a Flower App give them."""

from plumbing.common.arguments import given_flags, nonempty_path, number
from plumbing.common.process import UserError, printable, say
from plumbing.laptop.drawing import FORMATS

# Flags that --resume does not take from the checkpoint: where the server is reached, which run this is, what it prints.
OF_THE_MOMENT = ("dataset", "server_address", "server_port", "resume", "allow_new_data", "verbose")


def add_run_flags(add):
    add(
        "--resume",
        nargs="?",
        const=True,
        type=lambda text: str(nonempty_path(text)),
        metavar="FOLDER",
        help="resume from server.ptl in FOLDER (without one: ckps/<dataset>), with the same flags except its address "
        "and those that are given; `off` and --no-fedbn turn off what was on (default: off)",
    )
    add("--allow_new_data", action="store_true", help="resume even if the data changed")
    add("--picture_format", choices=FORMATS, default=FORMATS[0], help="draw all pictures as pdf or svg, too")
    add("--verbose", action="store_true", help="show Flower's log, too")


def optional(parse):
    """Return an argparse type that is `parse`, but None for "off": --resume can tell it from a flag not given."""
    return lambda text: None if text == "off" else parse(text)


def seconds_or_auto(text):
    """Be an argparse type: a number of seconds above 0, "auto", or "off", which is None."""
    return text if text == "auto" else optional(number(float, 0, inside=True))(text)


def as_flags(settings, parser):
    """Return `settings`, {name: value}, as flags of `parser`. TOML has no None: "" is a flag that is not given."""
    flags = []
    for name, value in settings.items():
        if value is True or (value is False and f"--no-{name}" in parser.format_usage()):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not False and value != "":
            flags.append(f"--{name}={value}")
    return flags


def app_settings(config, folder):
    """Return the flags in the run config of a Flower App whose suite is in `folder`."""
    settings = {name: value for name, value in config.items() if name != "folder"}
    if isinstance(settings.get("resume"), str) and settings["resume"]:
        settings["resume"] = str(folder / settings["resume"])  # the SuperLink may run elsewhere
    return settings


def as_before(parser, flags, earlier, path):
    """Return the arguments of a run that resumes from the checkpoint `path`: those in `flags`, else `earlier`.

    Prints in one line which are changed, and in one which are kept and not the default.
    """
    args, named = parser.parse_args(flags), given_flags(parser, flags)
    earlier = {name: value for name, value in earlier.items() if name in vars(args) and name not in OF_THE_MOMENT}
    kept = {name: value for name, value in earlier.items() if name not in named and value is not None}
    if kept.get("min_clients") == earlier.get("num_clients"):  # its default, which must not exceed a new num_clients
        kept.pop("min_clients", None)
    if args.allow_new_data:  # which may have another number of shards
        kept.pop("num_clients", None)
    try:
        args = parser.parse_args(as_flags(kept, parser) + flags)
    except UserError as error:
        raise UserError(f"cannot resume from {path} with its flags: {error}") from None

    def word(value):
        return "off" if value in (None, False) else "on" if value is True else printable(value)

    pairs = [(name, word(value), word(getattr(args, name))) for name, value in earlier.items() if name in named]
    changes = [f"{name}: {old} → {new}" for name, old, new in pairs if old != new]
    if changes:
        say(f"changed: {', '.join(changes)}")
    same = [f"{name} {word(value)}" for name, value in kept.items() if word(value) != word(parser.get_default(name))]
    if same:
        say(f"as before: {', '.join(same)}")
    return args
