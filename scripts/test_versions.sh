#!/usr/bin/env bash
# Run the fast tests on the versions that requirements.txt admits: one environment each, outside the tree.
#   bash scripts/test_versions.sh                    all of them, one after the other (several GB and 10 minutes each)
#   bash scripts/test_versions.sh oldest             one: oldest, gpu_image or newest
#   bash scripts/test_versions.sh newest -k sinkhorn        other arguments go to pytest
# Environments are kept in $VERSIONS_DIR (default ~/.cache/test_versions) and made anew when the requirements change.
# Interpreters are those on the PATH or of pyenv; uv brings the others where it may download them.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="${VERSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/test_versions}"

# name       Python   what is installed
#   oldest: each package of requirements.txt in the oldest version that it admits
#   gpu_image: what machines with a GPU commonly have
#   newest: what `pip install -r requirements.txt` brings today
versions="oldest gpu_image newest"
python_of() {
    case "$1" in oldest) echo 3.10 ;; gpu_image) echo 3.12 ;; newest) echo 3.13 ;; esac
}
install() {
    case "$1" in
        oldest) uv_pip --resolution lowest-direct -r requirements.txt ;;
        gpu_image) uv_pip -r requirements.txt "torch==2.11.*" "torchvision==0.26.*" ;;
        newest) uv_pip -r requirements.txt ;;
    esac
    # Of the tests' own packages any version does that goes with these. faiss 1.15 says that it goes with
    # numpy 1.26, and does not.
    case "$1" in
        oldest) uv_pip -r requirements-dev.txt "faiss-cpu<1.9" ;;
        *) uv_pip -r requirements-dev.txt ;;
    esac
}
uv_pip() {
    "$uv" pip install --quiet --python "$environment" "$@"
}

chosen=""
while [ $# -gt 0 ] && [[ " $versions " == *" $1 "* ]]; do
    chosen="$chosen $1"
    shift
done
chosen="${chosen:-$versions}"

mkdir -p "$folder"
uv="$folder/uv/bin/uv"
if [ ! -x "$uv" ]; then
    python3 -m venv "$folder/uv"
    "$folder/uv/bin/pip" install --quiet --disable-pip-version-check uv
fi
for bin in "$HOME"/.pyenv/versions/*/bin; do
    if [ -d "$bin" ]; then PATH="$PATH:$bin"; fi
done

status=0
report=""
for name in $chosen; do
    environment="$folder/$name"
    stamp="$environment/installed-$(cat requirements.txt requirements-dev.txt "$0" | cksum | tr -d ' ')"
    if [ ! -e "$stamp" ]; then
        echo "$name: installing into $environment"
        rm -rf "$environment"
        "$uv" venv --quiet --python "$(python_of "$name")" "$environment"
        install "$name"
        touch "$stamp"
    fi
    installed=$("$environment/bin/python" -c '
import platform, numpy, torch, torchvision
print("Python", platform.python_version(), "torch", torch.__version__, "torchvision", torchvision.__version__, "numpy", numpy.__version__)')
    echo "$name: $installed"
    log="$folder/$name.log"
    if OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$environment/bin/python" -m pytest --numprocesses auto \
        --dist worksteal -p no:cacheprovider "$@" 2>&1 | tee "$log"; then
        verdict="passed"
    else
        verdict="FAILED"
        status=1
    fi
    report="$report$(printf '%-10s %s: %s, %s' "$name" "$installed" "$verdict" "$(tail -n 1 "$log")")"$'\n'
done
printf '\n%s' "$report"
exit $status
