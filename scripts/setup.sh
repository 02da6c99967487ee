# Sourced by quickstart.sh and test.sh: make .venv and install the named requirement files into it.
# Skips what is done already; done again when a requirement file has changed.
#   setup requirements.txt requirements-dev.txt

setup() {
    local python=.venv/bin/python
    # python3 and its venv module are all that a bare machine needs to have
    if [ ! -x "$python" ]; then
        echo "making .venv with $(python3 --version)"
        python3 -m venv .venv
    fi
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || {
        echo "error: .venv has $("$python" --version), and Python 3.10 or newer is needed" >&2
        return 2
    }
    local stamp=.venv/installed-$(cat "$@" | cksum | tr -d ' ')
    if [ ! -e "$stamp" ]; then
        echo "installing $* into .venv (PyTorch is several GB: a minute or more)"
        local arguments=()
        for file in "$@"; do arguments+=(-r "$file"); done
        "$python" -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
        touch "$stamp"
    fi
}
