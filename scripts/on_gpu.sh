#!/usr/bin/env bash
# Test, measure and train on this machine's GPU, and write down what came out. Nothing is installed.
#   bash scripts/on_gpu.sh --data_path cifar10.tar.xz     tests, bench, profile, cifar: 18 minutes at most
#   bash scripts/on_gpu.sh tests bench --minutes 4        some of them, in less time
#   bash scripts/on_gpu.sh --device cpu --smoke           tiny, to see that it works, on any machine
#   bash scripts/on_gpu.sh --help
set -eu
cd "$(dirname "$0")/.."
python=python3
if [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
exec "$python" -m scripts.on_gpu "$@"
