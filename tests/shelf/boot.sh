#!/usr/bin/env bash
# Boot a Debian system as a device, until it is switched off: boot.sh FOLDER NAME BASE, started by devices.py in a mount
# namespace of its own, so that all mounts go when the device does. FOLDER holds its card: an overlay over BASE, on a disk
# of its own that a power cut can really cut.
set -eu
folder=$1 name=$2 base=$3 upper=$folder/card/upper code=133
mount -o loop,discard "$folder/card.img" "$folder/card"
if [ ! -s "$upper/etc/machine-id" ]; then # a new card: keys, name and id of its own
    mkdir -p "$folder/card/work" "$upper/etc/ssh"
    ssh-keygen -q -A -f "$upper" >/dev/null
    echo "$name" >"$upper/etc/hostname"
    echo "127.0.0.1 localhost $name" >"$upper/etc/hosts"
    tr -d - </proc/sys/kernel/random/uuid >"$upper/etc/machine-id"
    sync -f "$upper"
fi
mkdir -p /run/systemd/nspawn
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs tmpfs /run/systemd/nspawn
mount -t overlay overlay -o "lowerdir=$base,upperdir=$upper,workdir=$folder/card/work" "$folder/root"
while [ $code = 133 ]; do # it rebooted
    code=0
    (
        echo "$BASHPID" >"/sys/fs/cgroup/$name/cgroup.procs"
        exec systemd-nspawn --quiet --boot --directory "$folder/root" --machine "$name" --register=no --keep-unit \
            --network-namespace-path="/run/netns/$name" --resolv-conf=off --link-journal=no --timezone=off --console=pipe
    ) || code=$?
done
