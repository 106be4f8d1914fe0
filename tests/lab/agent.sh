#!/bin/sh
# What ssh is on a cluster: agent.sh [OPTIONS] HOST COMMAND…, run on the head of a lab of hosts.py.
# Hydra calls it for every host. As with ssh the command is one line for a shell, in an environment
# that has nothing of the caller's: what ranks are to have, the launcher must pass on.
set -eu
while [ "${1#-}" != "$1" ]; do
    shift
done
host=$1
shift
target=/proc/$(cat "/dev/shm/lab/$host")/ns
exec nsenter --net="$target/net" --uts="$target/uts" --ipc="$target/ipc" --mount="$target/mnt" \
    --pid="$target/pid_for_children" --wd=. -- \
    env -i HOME="$HOME" PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    sh -c "$*"
