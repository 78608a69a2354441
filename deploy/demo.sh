#!/usr/bin/env bash
# The whole suite on one machine: partition, one server, NUM_CLIENTS clients. Run by `make demo`, or as
#     DATASET=Shapes10 NUM_CLIENTS=4 NUM_ROUNDS=5 bash deploy/demo.sh
# SLOWDOWN="1 1 2 4" makes the third client 2 times slower and the fourth 4 times; ARGS has more flags of server.py.
# Its dataset is called demo-DATASET, so that a split that devices have is not replaced.
set -u
unset CDPATH BASH_ENV && unalias -a && unset -f $(compgen -A function) # what users have for their own shell
case ${SOURCE:-/} in /*) ;; *) [ ! -e "$SOURCE" ] || SOURCE=$PWD/$SOURCE ;; esac
cd "$(dirname "$0")/.."
python=.venv/bin/python
read -ra slowdown <<<"${SLOWDOWN:-}"
read -ra args <<<"${ARGS:-}"
num_clients=${NUM_CLIENTS:-$((${#slowdown[@]} > 0 ? ${#slowdown[@]} : 4))} num_rounds=${NUM_ROUNDS:-5}
source=${SOURCE:-${DATASET:-CIFAR10}} dataset=demo-${DATASET:-CIFAR10}
export OMP_NUM_THREADS=1 # several torch processes share this machine

partition() {
    "$python" partition.py --dataset "$dataset" --num_clients "$num_clients" --source "$source"
}

processes=()
trap '[ ${#processes[@]} -eq 0 ] || kill "${processes[@]}" 2>/dev/null; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if ! partition; then
    [ -z "${DATASET:-}${SOURCE:-}" ] || exit 2
    echo "CIFAR-10 cannot be downloaded: training on Shapes10 instead, a set of drawn shapes"
    source=Shapes10 dataset=demo-Shapes10
    partition || exit 2
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$python" server.py --server_port "$port" --dataset "$dataset" --num_clients "$num_clients" --num_rounds "$num_rounds" \
    ${args[@]+"${args[@]}"} &
server=$!
processes+=("$server")
echo "the demo starts the clients itself; on real boards, run the line that the server prints.
Each client prints to ckps/$dataset/client_<cid>.log"
mkdir -p "ckps/$dataset"
for ((cid = 0; cid < num_clients; cid++)); do
    "$python" client.py --server_port "$port" --dataset "$dataset" --cid "$cid" --num_threads 1 \
        --slowdown "${slowdown[cid]:-1}" >"ckps/$dataset/client_$cid.log" 2>&1 &
    processes+=($!)
done
wait "$server"
code=$?
if [ "$code" -eq 0 ]; then
    wait
    echo "to see the curves, open ckps/$dataset/metrics.png"
fi
exit "$code"
