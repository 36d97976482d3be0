#!/usr/bin/env bash
# All tests: ruff, then pytest. Uses the python3 at hand if it has every package, else makes .venv-tests.
set -euo pipefail
cd "$(dirname "$0")/.."
works() { "$1" -c 'import torch.nn, numpy, scipy.ndimage, PIL.Image, tqdm, pytest, ruff' 2> /dev/null; }
python=python3
if ! works $python && python=$PWD/.venv-tests/bin/python && ! works "$python"; then
  echo "installing requirements.txt and tests/requirements.txt into .venv-tests"
  rm -rf .venv-tests && python3 -m venv ".venv-tests-$$"
  ".venv-tests-$$/bin/python" -m pip install -q -r requirements.txt -r tests/requirements.txt
  python3 -c 'import os, sys; os.rename(*sys.argv[1:])' ".venv-tests-$$" .venv-tests || rm -rf ".venv-tests-$$"
fi
"$python" -m ruff check .
exec "$python" -m pytest -q -p no:cacheprovider "$@" tests
