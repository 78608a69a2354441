#!/usr/bin/env bash
# Set this board up as a client: make .venv beside the scripts, with what a device needs and no more. A second run does
# nothing; what a power cut left half done, the next run repairs.
#     bash deploy/setup_device.sh
#     bash deploy/setup_device.sh --check                         only say whether there is something to do (exit code 1)
#     PYTHON=python3.8 bash deploy/setup_device.sh                another Python than python3
#     WHEELHOUSE=/media/usb/wheels bash deploy/setup_device.sh    without a network: from a folder of wheels, or an https:// address
#     WHEELHOUSE=http://… bash deploy/setup_device.sh --insecure  over plain http, where anyone on the network can change them
set -u
unset CDPATH BASH_ENV && unalias -a && unset -f $(compgen -A function) # what users have for their own shell
umask 022
room=1500 room_beside_torch=500 room_tmp=600 # MB; .venv takes 824 and the downloads 182, where make test-arm64 runs

say() { printf 'setup_device.sh: %s\n' "$*"; }
fail() {
    say "$*" >&2
    exit 2
}
free() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1024) }'; } # MB

check= insecure=
for argument in "$@"; do
    case $argument in
    --check) check=yes ;;
    --insecure) insecure=yes ;;
    *) fail "unknown argument $argument: known are --check and --insecure" ;;
    esac
done
wheelhouse=${WHEELHOUSE:-}
case $wheelhouse in
'' | https://*) ;;
*://*)
    [ "$insecure" ] || fail "anyone on the network can change what $wheelhouse sends: use https, or --insecure"
    say "warning: anyone on the way to $wheelhouse can make this board run other code"
    ;;
*) wheelhouse=$(cd "$wheelhouse" 2>/dev/null && pwd) || fail "WHEELHOUSE=$WHEELHOUSE is not a folder" ;;
esac
cd "$(dirname "$0")/.." || exit 2
if [ -e .venv/setup ]; then
    say "nothing to do: make setup has made .venv, with all that a client needs"
    exit 0
fi

# What this is: 64 bit, a Python, and perhaps a torch that belongs to the system, as on a Jetson.
case $(uname -m) in
arm | armv* | i?86) fail "this is a 32-bit system ($(uname -m)), for which there is no torch: install a 64-bit system" ;;
esac
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "there is no $python: sudo apt-get install python3 python3-venv"
look='import struct, sys
print("%d %s %d.%d.%d" % ((struct.calcsize("P") * 8, sys.version_info >= (3, 8)) + sys.version_info[:3]))
print(getattr(sys, "_base_executable", sys.executable))' # the Python below an environment that is active
facts=$("$python" -c "$look" 2>/dev/null)
{ read -r bits new version && read -r below; } <<<"$facts" || fail "$python does not run"
python=$below
[ "$bits" = 64 ] || fail "this is a 32-bit system (its Python is), for which there is no torch: install a 64-bit system"
[ "$new" = True ] || fail "Python 3.8 or newer is needed, and this is $version: install one beside it, then PYTHON=python3.8 bash $0"
look='import importlib.metadata, importlib.util
for name in ("torch", "numpy"):
    try:
        print(importlib.metadata.version(name) if importlib.util.find_spec(name) else "none")
    except importlib.metadata.PackageNotFoundError:
        print("unknown")'
facts=$("$python" -c "$look" 2>/dev/null)
{ read -r torch && read -r numpy; } <<<"$facts" || fail "$python does not run"

# What to install. A torch of the system is kept, and the numpy that it works with.
packages=$(grep -E '^(filelock|flwr|numpy|torch|tqdm)\b' requirements.txt) limits=
if [ "$torch" != none ]; then
    packages=$(grep -v '^torch' <<<"$packages") room=$room_beside_torch limits='numpy<2'
    case $numpy in none | unknown) ;; *) limits=numpy==$numpy ;; esac
elif [ "$(uname -m)" = aarch64 ]; then # a Jetson too, where requirements.txt leaves the choice to NVIDIA
    limits='torch<2.10'
fi
wanted="Python $version at $python; its torch: $torch, numpy: $numpy
limits: $limits
$packages"
ready=.venv/device # written once everything works, and is on the card
is_ready() { [ -x .venv/bin/python ] && [ "$(cat $ready 2>/dev/null)" = "$wanted" ]; }

if [ "$check" ]; then
    is_ready && say "nothing to do" && exit 0
    say ".venv has to be made"
    exit 1
fi
if command -v flock >/dev/null; then # one at a time: a lost ssh session may have left one at work
    exec 9<.
    flock -n 9 || { say "another setup is running here: waiting for it" && flock 9; }
fi
if is_ready; then
    say "nothing to do: .venv has all that a client needs"
    exit 0
fi

# Room on the card, .venv, and a pip that can use today's wheels.
if [ "$(head -n 1 $ready 2>/dev/null)" = "$(head -n 1 <<<"$wanted")" ]; then
    say "bringing .venv up to date"
    rm $ready && sync # whoever interrupts this gets a new one
    room=$room_tmp
else
    say "making .venv with Python $version and $([ "$torch" = none ] && echo "a torch of its own" || echo "the system's torch $torch")"
    rm -rf .venv
fi
[ "$(free .)" -ge $room ] || fail "$(free .) MB are free in $PWD, $room MB are needed"
if [ "$torch" = none ] && [ -e /etc/nv_tegra_release ]; then
    say "NVIDIA's torch is not installed, so this Jetson will train on its CPU; deploy/README.md says how to install it"
fi
mkdir -p .venv || exit 2
log=.venv/log
last_line() { grep -v '^ *$' $log | tail -n 1 | cut -c 1-300; }
own=() && [ "$torch" = none ] || own=(--system-site-packages)
[ -x .venv/bin/pip ] || "$python" -m venv "${own[@]}" .venv >$log 2>&1 ||
    fail ".venv cannot be made ($(last_line)): sudo apt-get install python3-venv"
tmp=${TMPDIR:-/tmp}
if [ "$(free "$tmp")" -lt $room_tmp ]; then
    [ -z "${TMPDIR:-}" ] || fail "$(free "$tmp") MB are free in TMPDIR=$tmp, $room_tmp MB are needed"
    say "/tmp is small here, so pip unpacks on the card (TMPDIR=$PWD/.venv/tmp)"
    mkdir -p .venv/tmp && export TMPDIR=$PWD/.venv/tmp
fi
options=(--no-cache-dir --disable-pip-version-check --prefer-binary)
[ -z "$wheelhouse" ] || options+=(--no-index --find-links "$wheelhouse")
[ -n "$wheelhouse" ] || [ "$torch" != none ] || options+=($(bash deploy/torch_index.sh "$python")) # two words or none
case $wheelhouse in http://*) host=${wheelhouse#http://} && options+=(--trusted-host "${host%%/*}") ;; esac
install() {
    .venv/bin/python -m pip install "${options[@]}" "$@" 2>$log && return
    grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|Failed to establish' $log &&
        fail "pip cannot reach a package registry; without a network: WHEELHOUSE=FOLDER bash $0 (see deploy/README.md)"
    grep -q 'No space left' $log && fail "no space left on the card, or in TMPDIR=$tmp"
    fail "pip: $(grep '^ERROR' $log | tail -n 1 | cut -c 8-300)"
}
.venv/bin/python -c 'import sys, pip; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (20, 3))' ||
    install --upgrade pip
printf '%s\n' "$packages" >.venv/packages
printf '%s\n' "$limits" >.venv/limits
install --requirement .venv/packages --constraint .venv/limits

installed() { .venv/bin/python -c "from importlib.metadata import version; print(version('$1'))"; }
# One training step in a process of its own: a processor may refuse what pip has installed.
try='import filelock, flwr, numpy, torch, tqdm
net = torch.nn.Conv2d(3, 6, 5)
net(torch.from_numpy(numpy.ones((1, 3, 32, 32), "float32"))).sum().backward()'
{ FLWR_TELEMETRY_ENABLED=0 .venv/bin/python -c "$try" && code=0 || code=$?; } 2>$log # bash's own word on it too
case $code in
0) ;;
132) fail "torch $(installed torch) uses instructions that this processor lacks (SIGILL): install one below 2.10" ;;
135) fail "a file in .venv is truncated (SIGBUS), as the card is full or worn: run this again" ;;
137) fail "the system killed Python, as memory ran out: add swap (see docs/boards.md), and run this again" ;;
*) fail "torch and flwr cannot be used: $(last_line)" ;;
esac
rm -rf .venv/tmp
sync
printf '%s\n' "$wanted" >$ready.part && sync && mv $ready.part $ready && sync
say "ready: torch $(installed torch), flwr $(installed flwr), numpy $(installed numpy)"
