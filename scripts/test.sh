#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest (`bash scripts/test.sh -m slow`).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup requirements.txt requirements-dev.txt
exec .venv/bin/python -m pytest "$@"
