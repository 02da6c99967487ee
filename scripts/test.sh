#!/usr/bin/env bash
# Set up .venv and run the tests, on all cores, with one thread in each process.
#   bash scripts/test.sh                  the fast ones, about three minutes on two cores
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
unset PYTHONDONTWRITEBYTECODE # some hundred processes import the same files: compile them once
pytest=(.venv/bin/python -m pytest --numprocesses auto --dist worksteal)
"${pytest[@]}" "$@"
if $all; then
    # Some tests have limits of seconds, which hold on a machine that has nothing else to do: what fails
    # beside others is run once more alone, and has to pass then.
    "${pytest[@]}" -m slow "$@" || {
        echo "once more, alone:"
        .venv/bin/python -m pytest -m slow --last-failed --last-failed-no-failures none -v "$@"
    }
fi
