#!/usr/bin/env bash
# All tests: ruff, then pytest. Uses the python3 at hand if it has every package, else makes .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python3
has_packages() { "$1" -c 'from importlib.util import find_spec as f
import sys; sys.exit(not all(map(f, ("torch", "numpy", "scipy", "PIL", "tqdm", "pytest", "ruff"))))' 2>/dev/null; }
if ! has_packages $python; then
  python=$PWD/.venv/bin/python
  if ! has_packages "$python"; then
    echo "installing requirements.txt and tests/requirements.txt into .venv"
    python3 -m venv .venv
    "$python" -m pip install -q -r requirements.txt -r tests/requirements.txt
  fi
fi
"$python" -m ruff check .
exec "$python" -m pytest -q -p no:cacheprovider "$@" tests
