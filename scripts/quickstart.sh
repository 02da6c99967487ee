#!/usr/bin/env bash
# Install into .venv, train SwAV on scikit-learn's scanned digits, evaluate it by k-NN, draw pictures.
# Three minutes on two CPU cores after the installation; what is done already is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
setup requirements.txt
python=.venv/bin/python
run=runs/quickstart

"$python" main_swav.py --dump_path "$run"
if [ ! -e "$run/eval_knn.json" ] || [ "$run/checkpoint.pth" -nt "$run/eval_knn.json" ]; then
    "$python" eval_knn.py --pretrained "$run" --dump_path "$run" --labels_per_class 5 --draws 20 \
        --untrained --raw_pixels --neighbour_sheet
fi
"$python" scripts/quickstart_table.py "$run"
