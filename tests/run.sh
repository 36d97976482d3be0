#!/usr/bin/env bash
# All tests: ruff, then pytest. Uses the python3 at hand if it has every package, else makes .venv-tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/python.sh "$PWD/.venv-tests" "torch.nn, numpy, scipy.ndimage, PIL.Image, tqdm, pytest, ruff" requirements.txt tests/requirements.txt
"$python" -m ruff check .
exec "$python" -m pytest -q -p no:cacheprovider "$@" tests
