#!/usr/bin/env bash
# Print pip's option for a torch without CUDA (which takes gigabytes) where CUDA is of no use: on x86 Linux without an
# NVIDIA GPU. Says on stderr how much has to be downloaded. For make_venv.sh and setup_device.sh: torch_index.sh PYTHON
set -u
unset CDPATH BASH_ENV && unalias -a && unset -f $(compgen -A function) # what users have for their own shell
index=https://download.pytorch.org/whl/cpu
[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || exit 0
if timeout 10 nvidia-smi -L >/dev/null 2>&1; then
    echo "torch with CUDA, for the NVIDIA GPU here: about 3 GB to download, 6 GB on the disk" >&2
elif timeout 10 "$1" -c "import urllib.request; urllib.request.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
    echo "torch for the CPU, as there is no NVIDIA GPU here: about 0.3 GB to download, 1.5 GB on the disk" >&2
    echo "--extra-index-url $index"
else
    echo "$index cannot be reached: the registry's torch may bring CUDA, 3 GB to download, 6 GB on the disk" >&2
fi
