#!/usr/bin/env bash
# Set up .venv and run the tests, on all cores, with one thread in each process.
#   bash scripts/test.sh                  the fast ones, eight minutes on two cores
#   bash scripts/test.sh --all            the fast ones, then the slow ones
#   bash scripts/test.sh tests/test_swav.py -k queue        other arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup requirements.txt requirements-dev.txt

all=false
if [ "${1:-}" = "--all" ]; then
    all=true
    shift
fi
# One process a core: torch's own threads would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
pytest=(.venv/bin/python -m pytest --numprocesses auto --dist worksteal)
"${pytest[@]}" "$@"
if $all; then
    "${pytest[@]}" -m slow "$@"
fi
