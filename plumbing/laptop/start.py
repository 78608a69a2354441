"""What is checked and printed before the first round."""

from plumbing.common.arguments import plain_args
from plumbing.common.compare import fingerprint, seeded, trial
from plumbing.common.files import lock_file
from plumbing.common.process import UserError, say
from plumbing.common.split import describe_partition
from plumbing.common.state import batch_norm_names, float32_weights
from plumbing.laptop.rounds import LASTING
from plumbing.laptop.wandb_run import describe_code, start_wandb


def count_clients(args, shards, least):
    """Set num_clients and min_clients in `args`, and return how many clients train per round.

    shards: of the dataset, None if unknown. least: results that the strategy needs. Raises UserError.
    """
    args.num_clients = args.num_clients or shards or 10
    if shards is not None and args.num_clients > shards:
        raise UserError(f"--num_clients {args.num_clients}: {args.dataset} is split into {shards} shards only")
    args.min_clients = args.min_clients or args.num_clients
    if args.min_clients > args.num_clients:
        raise UserError(f"--min_clients {args.min_clients} is more than --num_clients {args.num_clients}")
    needs = f"--strategy {args.strategy} needs rounds of {least} clients or more; "
    if args.min_clients < least:
        counts = f"--num_clients {args.num_clients} --min_clients {args.min_clients}"
        raise UserError(f"{needs}{counts} allow smaller ones")
    num_drawn = max(1, int(args.fraction_fit * args.num_clients + 1e-9))  # 0.29 * 100 is 28.999999999999996
    if num_drawn < least:
        raise UserError(f"{needs}--fraction_fit {args.fraction_fit:g} of {args.num_clients} clients is {num_drawn}")
    return num_drawn


def check_effects(args, model):
    """Raise UserError if one of the flags `args` would have no effect on a run with this `model`."""
    if args.fedbn and not batch_norm_names(model):
        raise UserError(f"--fedbn has nothing to keep on the devices: {args.net} has no batch norm")
    if args.target_accuracy is not None and args.num_rounds < LASTING:
        raise UserError(f"--target_accuracy needs {LASTING} rounds or more, and --num_rounds is {args.num_rounds}")
    if args.compress != "off" and not any(float32_weights(model)):
        raise UserError(f"--compress {args.compress} is for float32 parameters, and {args.net} has none")


def describe_task(args, info, model, build_net):
    """Return what a client must have like the server (laptop/handshake). Raise UserError if the net cannot be used."""
    num_classes = len(info["classes"])
    with seeded(0):  # a net may have random buffers
        outputs = trial(build_net(args.net, info["channels"], num_classes))
    task = {"dataset": args.dataset, "dataset_id": info["id"], "channels": info["channels"], "sizes": info["sizes"]}
    return {**task, "num_classes": num_classes, "net": args.net, "fingerprint": fingerprint(model), "trial": outputs}


def hold_folder(folder, dataset):
    """Be the one server that writes to `folder`, as long as the lock that this returns is kept."""
    try:
        lock = lock_file(folder / "server.lock")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if lock is None:
        raise UserError(
            f"another server is training {dataset} in {folder}: end it first; "
            "a run that flwr run has started goes on until flwr stop"
        )
    return lock


def start_curves(args, info, model, earlier, needed):
    """Return the Curves of the run; print what is trained on what, if rounds are `needed`.

    info: of the dataset (common/split.describe_dataset). earlier: the earlier.Earlier that goes on.
    """
    facts = {name: value for name, value in info["written"].items() if name not in ("shards", "test", "split")}
    config = {**plain_args(args), "data": facts, **describe_code()}  # no digests, no table of the split
    curves, where = start_wandb(args.dataset, earlier.run_id, config, earlier.rows, needed=needed)
    if needed:
        num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        show_task(args, info, num_parameters)
    say(where)
    curves.show_split(info["split"], info["classes"])
    curves.catch_up(earlier.rows)
    return curves


def show_task(args, info, num_parameters):
    """Print what is trained on what. info: of the dataset (common/split.describe_dataset)."""
    facts = info["written"]
    text = f"{args.dataset}: {len(info['classes'])} classes"
    if "partition" in facts:
        text += f", {facts['num_train']:,} images in {facts['num_clients']} shards ({describe_partition(facts)})"
        text += f", {facts['num_test']:,} for the test"
    say(f"{text}; {args.net}: {num_parameters:,} parameters")
    if info["num_clients"] not in (None, args.num_clients):
        say(f"note: {args.dataset} is split into {info['num_clients']} shards, and --num_clients is {args.num_clients}")
    if args.augment:
        how = "shifted, and half of them mirrored" if info["channels"] == 3 else "shifted"
        say(f"note: training images are {how} at random; --no-augment leaves them as they are")
