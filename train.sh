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
OUT=${OUT:-out} ATTRIBUTE=${ATTRIBUTE:-race} SEED=${SEED:-0} SEEDS=${SEEDS:-$SEED} METHODS=${METHODS:-} GPUS=${GPUS:-1}
DATA=${DATA:-} CROP=${CROP:-512} SPLIT=${SPLIT:-} SKIP_BAD=${SKIP_BAD:-} RARE=${RARE:-} WEIGHTS=${WEIGHTS:-}
unset RANK WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS        # nothing but these settings steers a run
here=$(cd "$(dirname "$0")" && pwd) rows="plain oversample groupdro adv fairseg equal oracle" lanes=1 pids=""
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
# A row a scale: pixels, patients, batch of images, steps of points, base, ControlNet, TransUNet, sampler steps of
# masks and images. The last 1: trainings side by side, a core each; else one after another, and models of one group.
SCALE=${SCALE:-$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
case $SCALE in
  smoke) set -- 32 96 60 8 60 10 10 10 "8 --keep-invalid" 4 1 ;;
  cpu) set -- 64 1000 2000 8 2800 200 2600 1120 32 10 1 ;;
  gpu) set -- 128 8000 2000 48 10000 3000 6000 3000 100 50 "" ;;
  paper) set -- 224 8000 2000 48 2000000 50000 100000 "50000 --base --optimizer sgd" 100 50 "" ;;
  *) die "SCALE=$SCALE: expected smoke, cpu, gpu or paper" ;;
esac
side=${11}
[ -z "$side" ] || METHODS=${METHODS:-plain oversample equal oracle} lanes=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
[ "${METHODS:-all}" != all ] || METHODS=$rows
for n in "$SEED" "$GPUS" $SEEDS "${RARE:-0}"; do [[ $n =~ ^(0|[1-9][0-9]*)$ ]] || die "$n: expected a number like 7"; done
for row in $METHODS; do [[ " $rows " == *" $row "* ]] || die "METHODS=$METHODS: expected all, or some of $rows"; done
[ -z "$(printf '%s\n' $METHODS $SEEDS | sort | uniq -d)" ] || die "METHODS=$METHODS SEEDS=$SEEDS: expected each once"
[[ -z $WEIGHTS || (-f $WEIGHTS && $WEIGHTS == *R50+ViT-B_16.npz && $SCALE == paper) ]] ||
  die "WEIGHTS=$WEIGHTS SCALE=$SCALE: expected the file R50+ViT-B_16.npz, and SCALE=paper"
[ -e "${DATA:-.}" ] || die "DATA=$DATA: no such file or folder"
[ -z "$DATA" ] || METHODS=${METHODS/oracle/} DATA=$(cd "$(dirname "$DATA")" && pwd)/$(basename "$DATA")
[ -n "${METHODS// }" ] || die "METHODS=oracle: expected another row, only the phantom has an oracle"
[[ -z $WEIGHTS || $WEIGHTS == /* ]] || WEIGHTS=$PWD/$WEIGHTS
SPLIT=$(for file in $SPLIT; do [[ $file == /* ]] || file=$PWD/$file; echo "$file"; done)
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
trap 'for p in $pids; do kill -- -$p 2> /dev/null || true; done' EXIT
trap 'echo "train.sh: interrupted; the same command continues" >&2; exit 130' INT TERM HUP

# 1. Data; the oracle is topped up with fresh real patients, which only the phantom has
real=data/train.npz test=data/test.npz groups="--attribute $ATTRIBUTE" seed="--seed $SEED" scale=("$@")
if [ -z "$DATA" ]; then
  beside stage data fairdiff.py phantom --size $1 --train $2 --test $3 $seed ${RARE:+--rare $RARE} $groups --out data
  beside stage fresh fairdiff.py phantom --size $1 --train $2 --test 0 $seed --balance $ATTRIBUTE $groups --out fresh
else
  import=fairseg files=$(cd "$(dirname "$DATA")" && find -L "$(basename "$DATA")" -type f -exec wc -c {} + | sort | cksum | tr ' ' -)
  [[ ! -f $DATA && ! -f $DATA/train.npz ]] || import=split
  stage data fairdiff.py $import "$DATA" --size $1 --crop "$CROP" ${SPLIT:+--split $SPLIT} ${SKIP_BAD:+--skip-bad} --files $files $groups --out data
fi
join
# 2. Points to masks (Section 2.2), 3. masks to images (Section 2.3): models of all groups, or 1, 2, ... of one each
generate() {
  stage points-$1 pointdiff.py train $real $groups "${@:2}" --steps ${scale[4]} $seed --out points-$1.pt
  stage masks-$1 pointdiff.py sample points-$1.pt --steps ${scale[8]} $seed --out masks-$1.npz
  stage score-masks-$1 pointdiff.py evaluate masks-$1.npz $real $test $groups --out masks-$1.csv
  stage control-$1 controlnet.py train-control $real base.pt "${@:2}" --steps ${scale[6]} --batch ${scale[3]} $seed --out control-$1.pt
  stage synthetic-$1 controlnet.py sample control-$1.pt masks-$1.npz --steps ${scale[9]} $seed --out synthetic-$1.npz
  stage real-masks-$1 controlnet.py sample control-$1.pt $real --n 100 --steps ${scale[9]} $seed --out real-masks-$1.npz
}
models() {
  local n=0 name
  stage base controlnet.py train-base $real $groups --steps ${scale[5]} --batch ${scale[3]} $seed --out base.pt
  stage base-alone controlnet.py sample base.pt $real --n 100 --steps ${scale[9]} $seed --out base-alone.npz
  [ -z "$side" ] || { generate all; return; }
  while IFS= read -r name <&3; do n=$((n + 1)); generate $n --group "$name"; done 3< <("$python" -c 'import numpy, sys
print(*sorted(set(numpy.load(sys.argv[1])[sys.argv[2]]) - {""}), sep="\n")' $real "$ATTRIBUTE")
}
# 5. TransUNet (Section 3): every row of the tables takes the same number of steps
row() {
  local set=$real flags="--method $1"
  case $1 in equal) set=mixed.npz flags="" ;; oracle) set=oracle.npz flags="" ;; judge) flags="--method oversample --width 24" ;; esac
  stage $1-$2 transunet.py train $set $flags $groups --steps ${scale[7]} --batch ${scale[3]} --seed $2 ${WEIGHTS:+--weights "$WEIGHTS"} --out $1-$2.pt
  stage predict-$1-$2 transunet.py predict $1-$2.pt $test --out pred/$1-$2.npz
}
rows() { for row in $METHODS; do for n in $SEEDS; do [[ " $1 " != *" $row "* ]] || beside row $row $n; done; done; }
beside models
[ -n "$DATA" ] || stage oracle fairdiff.py mix $real fresh/train.npz $groups $seed --out oracle.npz
beside row judge 1000
rows "plain oversample groupdro adv fairseg oracle"
join
# 4. Equal Scale (Section 2.4, Eq. 6)
stage mix fairdiff.py mix $real synthetic-*.npz $groups $seed --out mixed.npz
rows equal
# 6. Evaluation: images (Table 1), segmentation (Tables 2-5), one page with everything
beside stage score-images controlnet.py evaluate judge-1000.pt $real $test base-alone.npz real-masks-*.npz synthetic-*.npz $groups --out table1.csv
join
predictions=$(for row in $METHODS; do for n in $SEEDS; do echo "$row:$n=pred/$row-$n.npz"; done; done)
stage table-$(cksum <<< "$predictions" | cut -d ' ' -f 1) fairness.py table $test $predictions $groups --out results.csv
"$python" "$here/fairdiff.py" report .
tail -n 11 "$(ls -t log/table-*.txt | head -n 1)"
echo "all of it in $SECONDS s: $OUT/report.html"
