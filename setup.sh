#!/bin/sh
# Makes .venv with everything in requirements.txt and this package. Run by make; safe to run again.
set -eu
PYTHON="${PYTHON:-python3}"
# The library runs on 3.13 as well; silva-networks forbids numpy 2, which is what 3.13 has wheels of.
if ! "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
    echo "The tests and experiments need Python 3.11 or 3.12; '$PYTHON' is $("$PYTHON" --version 2>&1 || echo missing). Set PYTHON=…" >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
export PIP_USE_PEP517=1  # pip's isolated build: learn2learn's old C sources are generated anew
grep -v '^learn2learn' requirements.txt >.venv/requirements.txt
.venv/bin/python -m pip install --disable-pip-version-check --quiet -r .venv/requirements.txt
if command -v "${CC:-cc}" >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1; then
    grep '^learn2learn' requirements.txt >.venv/learn2learn.txt
    .venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -r .venv/learn2learn.txt
else
    echo "There is no C compiler here, so learn2learn is left out and its task sets will not work; everything else is installed." >&2
fi
.venv/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
touch .venv/ready
