#!/usr/bin/env bash
# FairDiff end to end: generate masks for every group, generate an image for every mask, top up the small groups,
# train TransUNet with and without them, and measure how evenly each one segments the groups.
#   bash train.sh                                      phantom data; uses a GPU if there is one
#   SCALE=smoke bash train.sh                          every stage in a minute, the numbers mean nothing
#   ATTRIBUTE=gender OUT=out-gender bash train.sh      another group column; RARE=30: patients of the rarest race
#   METHODS="plain equal" SEEDS="0 1 2" bash train.sh  rows of the table (or all), trainings of each
#   DATA=path/to/fairseg bash train.sh                 Harvard-FairSeg (CROP, SPLIT, SKIP_BAD=1) or your own sets
#   SCALE=paper GPUS=4 WEIGHTS=R50+ViT-B_16.npz DATA=path/to/fairseg bash train.sh
# The same command again skips what is done and continues the rest.
set -euo pipefail
set -m                                                  # a process group a job, so that Ctrl-C stops all of it
here=$(cd "$(dirname "$0")" && pwd) known="plain oversample groupdro adv fairseg equal oracle"
OUT=${OUT:-out} ATTRIBUTE=${ATTRIBUTE:-race} SEED=${SEED:-0} SEEDS=${SEEDS:-$SEED} METHODS=${METHODS:-} GPUS=${GPUS:-1}
DATA=${DATA:-} CROP=${CROP:-512} SPLIT=${SPLIT:-} SKIP_BAD=${SKIP_BAD:-} RARE=${RARE:-} WEIGHTS=${WEIGHTS:-}
unset RANK WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS        # nothing but these settings steers a run
die() { echo "train.sh: $1" >&2; exit 2; }

# Python: the one at hand if it has the packages, else a virtual environment, which is whole or not there
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$(python3 -V); expected Python 3.10 or newer"
works() { "$1" -c 'import torch.nn, numpy, scipy.ndimage, PIL.Image, tqdm' 2> /dev/null; }
python=python3
if ! works $python && python=$here/.venv/bin/python && ! works "$python"; then
  echo "installing the packages of requirements.txt into .venv"
  rm -rf "$here/.venv" && python3 -m venv "$here/.venv-$$"
  "$here/.venv-$$/bin/python" -m pip install -q -r "$here/requirements.txt"
  python3 -c 'import os, sys; os.rename(*sys.argv[1:])' "$here/.venv-$$" "$here/.venv" || rm -rf "$here/.venv-$$"
fi

# A row a scale: pixels a side, patients, steps of the four trainings, batch of diffusion and of TransUNet, sampler
# steps. side=1: trainings run side by side, one core each; without, one after another, and each group has its models.
SCALE=${SCALE:-$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
side="" keep="" model="" rows=$known lanes=1 pids=""
case $SCALE in
  smoke) set -- 32 96 60 60 10 10 10 8 8 8 4; side=1 keep=--keep-invalid ;;
  cpu) set -- 64 1000 2000 2800 350 1300 1120 8 8 32 10; side=1 ;;
  gpu) set -- 128 8000 2000 10000 3000 6000 3000 48 48 100 50 ;;
  paper) set -- 224 8000 2000 2000000 50000 100000 50000 48 48 100 50; model="--base --optimizer sgd" ;;
  *) die "SCALE=$SCALE: expected smoke, cpu, gpu or paper" ;;
esac
[ -z "$side" ] || rows="plain oversample equal oracle" lanes=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
METHODS=${METHODS:-$rows}
[ "$METHODS" != all ] || METHODS=$known
for n in "$SEED" "$GPUS" $SEEDS "${RARE:-0}"; do [[ $n =~ ^(0|[1-9][0-9]*)$ ]] || die "$n: expected a number like 7"; done
for row in $METHODS; do [[ " $known " == *" $row "* ]] || die "METHODS=$METHODS: expected all, or some of $known"; done
[ -z "$(printf '%s\n' $METHODS $SEEDS | sort | uniq -d)" ] || die "METHODS=$METHODS SEEDS=$SEEDS: expected each once"
absolute() { [ -e "$1" ] && (cd "$(dirname "$1")" && echo "$PWD/$(basename "$1")"); }
if [ -n "$WEIGHTS" ]; then
  [ "$SCALE" = paper ] && WEIGHTS=$(absolute "$WEIGHTS") && "$python" -c 'import numpy, sys
numpy.load(sys.argv[1])["embedding/kernel"]' "$WEIGHTS" 2> /dev/null || die "WEIGHTS: expected R50+ViT-B_16.npz, SCALE=paper"
fi
if [ -n "$DATA" ]; then
  DATA=$(absolute "$DATA") || die "DATA: no such file or folder"
  METHODS=${METHODS/oracle/} files=$(find -L "$DATA" -type f -exec wc -c {} + | sort | cksum | tr ' ' -) import=fairseg
  [ ! -f "$DATA" ] && [ ! -f "$DATA/train.npz" ] || import=split
fi
mkdir -p "$OUT/log" && cd "$OUT"                        # all paths are relative to it, so that it may be moved

# stage NAME FILE COMMAND ARGS...: run one command, keep what it prints, skip it the next time
stage() {
  local name=$1 started=$SECONDS launch=""; shift
  if [ -f "log/$name.done" ]; then
    diff <(printf '%s\n' "$@") "log/$name.done" > "log/$name.diff" && echo "== $name: done" && return
    die "OUT=$OUT: $name had other settings (now <, then >): $(grep '^[<>]' "log/$name.diff" | tr '\n' ' ')- choose another OUT"
  fi
  echo "== $name: $*"
  [[ $GPUS == 1 || $2 != train* ]] || launch="-m torch.distributed.run --standalone --nproc_per_node=$GPUS"
  ${side:+env OMP_NUM_THREADS=1} "$python" $launch "$here/$1" "${@:2}" > "log/$name.txt"
  printf '%6d s  %s\n' $((SECONDS - started)) "$name" | tee -a log/seconds.txt
  printf '%s\n' "$@" > "log/$name.done"
}
# beside COMMAND: run it beside the others as soon as a core is free; join: wait for all (bash 3.2 has no wait -n)
beside() { while [ "$(jobs -rp | wc -l)" -ge $lanes ]; do sleep 0.2; done; "$@" & pids="$pids $!"; }
join() { for pid in $pids; do wait $pid || exit; done; pids=""; }
trap 'for p in $pids; do kill -- -$p; done 2> /dev/null; echo "interrupted; the same command continues" >&2; exit 130' INT TERM

# 1. Data; the oracle is topped up with fresh real patients, which only the phantom has
real=data/train.npz test_set=data/test.npz groups="--attribute $ATTRIBUTE" seed="--seed $SEED"
if [ -z "$DATA" ]; then
  phantom="fairdiff.py phantom --size $1 --train $2 $seed"
  beside stage data $phantom --test $3 ${RARE:+--rare $RARE} $groups --out data
  beside stage fresh $phantom --test 0 --balance $ATTRIBUTE $groups --out fresh
else
  stage data fairdiff.py $import "$DATA" $groups --size $1 --crop "$CROP" ${SPLIT:+--split $SPLIT} ${SKIP_BAD:+--skip-bad} --files $files --out data
fi
join
# 2. Points to masks (Section 2.2), 3. masks to images (Section 2.3): of part all, or 1, 2, ... for the groups
parts() {
  local n=0 name
  [ -z "$side" ] || { "$@" all; return; }
  while IFS= read -r name <&3; do n=$((n + 1)); "$@" $n --group "$name"; done 3< <(cd "$here" && "$python" -c 'import fairdiff, sys
print(*fairdiff.group_codes(fairdiff.load_set(sys.argv[1]), sys.argv[2])[1], sep="\n")' "$OLDPWD/$real" "$ATTRIBUTE")
}
fit_points="--steps $4 $seed" fit_base="--steps $5 --batch $8 $seed" fit_control="--steps $6 --batch $8 $seed"
fit_seg="--steps $7 --batch $9 $model" draw="--steps ${10} $seed $keep" paint="--steps ${11} $seed"
points() {
  stage points-$1 pointdiff.py train $real $groups "${@:2}" $fit_points --out points-$1.pt
  stage masks-$1 pointdiff.py sample points-$1.pt $draw --out masks-$1.npz
  stage score-masks-$1 pointdiff.py evaluate masks-$1.npz $real $test_set $groups --out masks-$1.csv
}
control() { stage control-$1 controlnet.py train-control $real base.pt "${@:2}" $fit_control --out control-$1.pt; }
images() { stage base controlnet.py train-base $real $groups $fit_base --out base.pt; parts control; }
paint() {
  stage synthetic-$1 controlnet.py sample control-$1.pt masks-$1.npz $paint --out synthetic-$1.npz
  stage without-$1 controlnet.py sample control-$1.pt $real "${@:2}" --n 100 $paint --out without-$1.npz
}
# 5. TransUNet (Section 3): every row of the tables takes the same number of steps
row() {
  local set=$real method=$1
  case $1 in equal) set=mixed.npz method=plain ;; oracle) set=oracle.npz method=plain ;; esac
  stage $1-$2 transunet.py train $set --method $method $groups $fit_seg --seed $2 ${WEIGHTS:+--weights "$WEIGHTS"} --out $1-$2.pt
  stage predict-$1-$2 transunet.py predict $1-$2.pt $test_set --out pred/$1-$2.npz
}
judge() { stage judge transunet.py train $real --method oversample $groups --width 24 $fit_seg --seed 1000 --out judge.pt; }
rows() { for row in $METHODS; do for s in $SEEDS; do [[ $1 != *" $row "* ]] || beside row $row $s; done; done; }
mix="fairdiff.py mix $real" equal="$groups $seed"
beside images
beside parts points
[ -n "$DATA" ] || beside stage oracle $mix fresh/train.npz $equal --out oracle.npz
beside judge
rows " plain oversample groupdro adv fairseg "
join
rows " oracle "
parts beside paint
beside stage free controlnet.py sample base.pt $real --n 100 $paint --out free.npz
join
# 4. Equal Scale (Section 2.4, Eq. 6)
stage mix $mix synthetic-*.npz $equal --out mixed.npz
rows " equal "
# 6. Evaluation: images (Table 1), segmentation (Tables 2-5), one page with everything
sets=("base alone=free.npz")
for file in without-*.npz; do sets+=("w/o Point-Mask=$file"); done
for file in synthetic-*.npz; do sets+=("w/ Point-Mask=$file"); done
beside stage score-images controlnet.py evaluate judge.pt $real $test_set "${sets[@]}" $groups --out table1.csv
join
predictions=()
for row in $METHODS; do for s in $SEEDS; do predictions+=("$row:$s=pred/$row-$s.npz"); done; done
stage table-$(cksum <<< "$METHODS $SEEDS" | cut -d ' ' -f 1) fairness.py table $test_set "${predictions[@]}" $groups --out results.csv
"$python" "$here/fairdiff.py" report .
cat log/table-*.txt | tail -n 9
echo "all of it in $SECONDS s: $OUT/report.html"
