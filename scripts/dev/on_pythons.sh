#!/usr/bin/env bash
# The serial tests on other Pythons: python3.10 and what else is named. Each gets an environment of
# its own in a temporary directory, with what pip finds for it, and a line at the end that says on
# what the tests ran and what came out.
#
#     scripts/dev/on_pythons.sh python3.10 python3.13
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $# -gt 0 ]] || { echo "usage: $0 PYTHON…" >&2; exit 2; }

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
versions='import platform; from importlib.metadata import version
names = "numpy tokenizers h5py mpi4py jinja2".split()
print("Python", platform.python_version(), *(f"{name} {version(name)}" for name in names), sep=", ")'
report=()
for python in "$@"; do
    home="$room/${#report[@]}"
    "$python" -m venv "$home"
    "$home/bin/pip" install -q '.[mpich,test]'
    status=passed
    PATH="$home/bin:$PATH" OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q tests/serial || status=FAILED
    report+=("$status: $("$home/bin/python" -c "$versions")")
done
printf '%s\n' "${report[@]}"
[[ "${report[*]}" != *FAILED* ]]
