#!/bin/sh
# Make a virtual environment with what the repository needs: `sh scripts/set-up.sh .venv`, or `make setup`.
set -eu
venv=$1
extras=${EXTRAS:-all,dev,docs}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Prints an interpreter of Python 3.12 or newer: the one called so, the plain one, or pyenv's newest.
find_python() {
    for name in python3.12 python3 python; do
        if path=$(command -v "$name") && new_enough "$path"; then
            echo "$path"
            return
        fi
    done
    root=${PYENV_ROOT:-$HOME/.pyenv}
    for path in "$root"/versions/3.12*/bin/python3 "$root"/versions/3.*/bin/python3; do
        if [ -x "$path" ] && new_enough "$path"; then
            echo "$path"
            return
        fi
    done
}

make_venv() {
    python=$(find_python)
    if [ -n "$python" ]; then
        "$python" -m venv --clear "$venv" && return
        echo "$python cannot make virtual environments: install its venv package (python3-venv on Debian)" >&2
    elif command -v uv >/dev/null; then
        uv venv --clear --seed --python 3.12 "$venv" && return
    else
        echo "Python 3.12 or newer is needed and was not found. Install it from your system's packages, with pyenv" >&2
        echo "(pyenv install 3.12), or install uv, which brings its own; then type the same command again." >&2
    fi
    exit 1
}

# One that works is brought up to date; one that was cut off half-way is made again.
if ! new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    make_venv
fi

"$venv/bin/python" -m pip install --quiet uv
"$venv/bin/uv" pip install --python "$venv/bin/python" -c requirements.lock -e ".[$extras]"
