# . python.sh VENV MODULES FILE...: set $python to the python3 at hand if it can import MODULES, else to the Python of
# a virtual environment VENV with the packages that FILEs list; VENV is whole or not there, even if two runs make it
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  { echo "$(python3 -V); expected Python 3.10 or newer" >&2; exit 2; }
imports() { "$1" -c "import $modules" 2> /dev/null; }
venv=$1 modules=$2 python=python3; shift 2
if ! imports $python && python=$venv/bin/python && ! imports "$python"; then
  rm -rf "$venv" && python3 -m venv "$venv-$$"
  "$venv-$$/bin/python" -m pip install "${@/#/-r}"
  # not by mv, which would move it into one that another run has made meanwhile
  python3 -c 'import os, sys; os.rename(*sys.argv[1:])' "$venv-$$" "$venv" 2> /dev/null || rm -rf "$venv-$$"
fi
