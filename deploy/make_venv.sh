#!/usr/bin/env bash
# Make one of the laptop's environments, or complete it: make_venv.sh FOLDER PIP_ARGUMENTS... Run by make, which names the
# Python in SETUP_PYTHON.
set -eu
unset CDPATH BASH_ENV && unalias -a && unset -f $(compgen -A function) # what users have for their own shell
python=${SETUP_PYTHON:-python3}
fail() {
    echo "make_venv.sh: $*" >&2
    exit 2
}
command -v "$python" >/dev/null || fail "there is no $python: sudo apt-get install python3 python3-venv"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || fail "$python does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "the laptop needs Python 3.11 or newer, and $python is $version: choose another, as with SETUP_PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make environments: sudo apt-get install python$version-venv"
folder=$1
shift
echo "making $folder; the first time, this takes a few minutes"
options=
case " $* " in *" requirements.txt "*) options=$(bash deploy/torch_index.sh "$python") ;; esac
"$python" -m venv "$folder"
"$folder/bin/python" -m pip install --disable-pip-version-check $options "$@"
