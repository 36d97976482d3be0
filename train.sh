#!/usr/bin/env bash
# FairDiff end to end: generate masks for every group, generate an image for every mask, top up the small groups,
# train TransUNet with and without them, and measure how evenly each one segments the groups.
#   bash train.sh                                      phantom data; uses a GPU if there is one
#   METHODS="plain equal" SEEDS="0 1 2" bash train.sh  rows of the table (or all), trainings of each
#   DATA=path/to/fairseg bash train.sh                 Harvard-FairSeg (CROP, SPLIT, SKIP_BAD=1) or your own sets
#   SCALE=paper GPUS=4 WEIGHTS=R50+ViT-B_16.npz DATA=path/to/fairseg bash train.sh
# More settings: README. The same command again skips what is done and continues the rest.
set -meuo pipefail                                      # m: a process group a job, which the trap can end as a whole
OUT=${OUT:-out} ATTRIBUTE=${ATTRIBUTE:-race} SEED=${SEED:-0} SEEDS=${SEEDS:-$SEED} GPUS=${GPUS:-1} CROP=${CROP:-512}
unset RANK WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS CDPATH # nothing but these settings steers a run
all="plain oversample groupdro adv fairseg equal balanced no-points oracle" here=$(cd "$(dirname "$0")" && pwd) pids=""
die() { echo "train.sh: $1" >&2; exit 2; }
# Python: the one at hand if it has the packages, else a virtual environment, which is whole or not there
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$(python3 -V); expected Python 3.10 or newer"
works() { "$1" -c 'import torch.nn, numpy, scipy.ndimage, PIL.Image, tqdm' 2> /dev/null; }
python=python3
if ! works $python && python=$here/.venv/bin/python && ! works "$python"; then
  rm -rf "$here/.venv" && python3 -m venv "$here/.venv-$$"
  "$here/.venv-$$/bin/python" -m pip install -r "$here/requirements.txt"
  python3 -c 'import os, sys; os.rename(*sys.argv[1:])' "$here/.venv-$$" "$here/.venv" || rm -rf "$here/.venv-$$"
fi
# A row a scale. points, base, control, seg: training steps; masks, images: sampling steps; lanes: jobs side by side, a
# core each; models: all, one for all groups, or, as in the paper, one of each
lanes=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) methods="plain twice oversample equal oracle" models=all network=""
SCALE=${SCALE:-$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
case $SCALE in
  smoke) size=32 train=96 test=60 rare="" batch=8 points=60 base=10 control=10 seg=10 masks="8 --keep-invalid" images=4 ;;
  cpu) size=64 train=1000 test=2000 rare=30 batch=8 points=2800 base=200 control=2200 seg=1120 masks=32 images=8 ;;
  gpu) size=128 train=8000 test=2000 rare="" batch=48 points=6000 base=2000 control=4000 seg=2000 masks=32 images=20 lanes=4 models="" methods=all ;;
  paper) size=224 train=8000 test=2000 rare="" batch=48 points="2000000 --batch 48 --lr 1e-4 --points 512" base=50000 control=100000 seg=50000 masks="32 --points 512" images=20 lanes=1 models="" methods=all network="--base --optimizer sgd" ;;
  *) die "SCALE=$SCALE: expected smoke, cpu, gpu or paper" ;;
esac
METHODS=${METHODS:-$methods} METHODS=${METHODS/all/$all} RARE=${RARE:-$rare}
[[ " $METHODS " == *" oversample "* ]] || METHODS="$METHODS oversample"         # its network judges the images
n='(0|[1-9][0-9]*)' numbers="^$n;$n( +$n)*;[1-9][0-9]*;([1-9][0-9]*)?$"
[[ "$SEED;$SEEDS;$GPUS;$RARE" =~ $numbers ]] || die "SEED=$SEED SEEDS=$SEEDS GPUS=$GPUS RARE=$RARE: expected numbers, the last two above 0"
for row in $METHODS; do [[ " $all twice " == *" $row "* ]] || die "METHODS=$METHODS: expected some of: all $all twice"; done
[ -z "$(printf '%s\n' $SEEDS | sort | uniq -d)" ] || die "SEEDS=$SEEDS: expected each once"
absolute() { for file in "$@"; do [[ -z $file || $file == /* ]] || file=$PWD/$file; echo "$file"; done; }
DATA=$(absolute "${DATA:-}") WEIGHTS=$(absolute "${WEIGHTS:-}") SPLIT=$(absolute ${SPLIT:-})
[ -z "$WEIGHTS" ] || { [ $SCALE = paper ] && "$python" -m zipfile -l "$WEIGHTS" 2> /dev/null | grep conv_root/kernel > /dev/null; } ||
  die "WEIGHTS=$WEIGHTS SCALE=$SCALE: expected the file R50+ViT-B_16.npz, and SCALE=paper"
[ -z "$DATA" ] || METHODS=${METHODS//oracle/} files=$(find -L "$DATA" -type f -exec wc -c {} + 2> /dev/null | sort | cksum) || die "DATA=$DATA: cannot be read"
mkdir -p "$OUT/log" && cd "$OUT"                        # all paths are relative to it, so that it may be moved
# stage NAME FILE COMMAND ARGS...: run one command, keep what it prints, skip it the next time
stage() {
  local name=$1 done=log/$1.done started=$SECONDS launch="" changes; shift
  [[ $GPUS == 1 || $2 != train* ]] || launch="-m torch.distributed.run --standalone --nproc_per_node=$GPUS"
  changes=$(diff <(printf '%s\n' $launch "$@" "files ${files:-}") $done 2> /dev/null) && echo "== $name: done" && return
  [ ! -f $done ] || die "OUT=$OUT: $name had other settings (now <, then >): $(grep '^[<>]' <<< "$changes" | tr '\n' ' ')- choose another OUT"
  echo "== $name: $*"
  OMP_NUM_THREADS=1 "$python" $launch "$here/$1" "${@:2}" > log/$name.txt
  printf '%6d s  %s\n' $((SECONDS - started)) "$name" | tee -a log/seconds.txt
  printf '%s\n' $launch "$@" "files ${files:-}" > $done
}
# beside COMMAND: run it beside the others as soon as a lane is free; should it fail, all ends (bash 3.2 has no wait -n)
beside() {
  while [ "$(jobs -rp | wc -l)" -ge $lanes ]; do sleep 0.2; done
  { trap '[ $? = 0 ] || kill -USR1 $$' EXIT; "$@"; } & pids="$pids $!"
}
trap 'exit 2' USR1; trap 'for p in $pids; do kill -- -$p 2> /dev/null || true; done' EXIT

# 1. Data; the oracle is topped up with fresh real patients, which only the phantom has
real=data/train.npz test_set=data/test.npz groups=(--attribute "$ATTRIBUTE") seed="--seed $SEED"
if [ -z "$DATA" ]; then
  stage data fairdiff.py phantom --size $size --train $train --test $test $seed ${RARE:+--rare $RARE} "${groups[@]}" --out data
  beside stage fresh fairdiff.py phantom --size $size --train $train --test 0 $seed --balance "$ATTRIBUTE" "${groups[@]}" --out fresh
elif [[ -f $DATA || -f $DATA/train.npz ]]; then
  stage data fairdiff.py split "$DATA" "${groups[@]}" --out data
else
  stage data fairdiff.py fairseg "$DATA" --size $size --crop "$CROP" ${SPLIT:+--split $SPLIT} ${SKIP_BAD:+--skip-bad} "${groups[@]}" --out data
fi
# 2. Points to masks (Section 2.2), 3. masks to images (Section 2.3): models of all groups, or 1, 2, ... of one each
[ -n "$models" ] || models=$("$python" -c 'import numpy, sys
for n, name in enumerate(sorted(set(numpy.load(sys.argv[1])[sys.argv[2]]) - {""}), 1): print(n, name, sep="\t")' $real "$ATTRIBUTE")
# each COMMAND: run it for every model, in place of @ its name; $group is the one that it is for, if any
each() { while IFS=$'\t' read -r n group <&3; do "${@//@/$n}"; done 3<<< "$models"; }
train_points() {
  stage points-$1 pointdiff.py train $real "${groups[@]}" ${group:+--group "$group"} --steps $points $seed --out points-$1.pt
  stage masks-$1 pointdiff.py sample points-$1.pt --steps $masks $seed --out masks-$1.npz
  stage score-masks-$1 pointdiff.py evaluate masks-$1.npz $real $test_set "${groups[@]}" --out masks-$1.csv
}
train_control() {
  stage control-$1 controlnet.py train-control $real base.pt ${group:+--group "$group"} --steps $control --batch $batch $seed --out control-$1.pt
}
# 4. TransUNet (Section 3): every row of the tables but twice takes the same number of steps
row() {
  local set=$real flags="--method $1" steps=$seg
  case $1 in
    no-points | oracle) set=$1.npz flags="" ;; equal) set=mixed.npz flags="" ;; balanced) set=mixed.npz ;;
    twice) flags="" steps=$((2 * seg)) ;;               # plain, to see whether training was long enough
  esac
  stage $1-$2 transunet.py train $set $flags $network "${groups[@]}" --steps $steps --batch $batch --seed $2 ${WEIGHTS:+--weights "$WEIGHTS"} --out $1-$2.pt
  stage predict-$1-$2 transunet.py predict $1-$2.pt $test_set --out pred/$1-$2.npz
}
rows() { for row in "$@"; do for n in $SEEDS; do [[ " $METHODS " != *" $row "* ]] || beside row $row $n; done; done; }
beside stage base controlnet.py train-base $real "${groups[@]}" --steps $base --batch $batch $seed --out base.pt; base_job=$!
each beside train_points @
wait $base_job
each beside train_control @
generators=$pids
rows oversample plain twice                             # they need no generated images
wait $generators
beside each stage synthetic-@ controlnet.py sample control-@.pt masks-@.npz --steps $images $seed --out synthetic-@.npz; synthetic=$!
beside each stage real-masks-@ controlnet.py sample control-@.pt $real --equal --steps $images $seed --out real-masks-@.npz; real_masks=$!
beside stage base-alone controlnet.py sample base.pt $real --n 100 --steps $images $seed --out base-alone.npz; drawn=$pids
[ -n "$DATA" ] || stage oracle fairdiff.py mix $real fresh/train.npz "${groups[@]}" $seed --out oracle.npz
wait $synthetic
# 5. Equal Scale (Section 2.4, Eq. 6), and the same over the masks of training images: without the point model
stage mix fairdiff.py mix $real synthetic-*.npz "${groups[@]}" $seed --out mixed.npz
[[ $METHODS != *no-points* ]] || { wait $real_masks; stage mix-no-points fairdiff.py mix $real real-masks-*.npz "${groups[@]}" $seed --out no-points.npz; }
rows groupdro adv fairseg equal balanced oracle no-points
# 6. Evaluation: images (Table 1), segmentation (Tables 2-5), one page with everything
wait $drawn
beside stage score-images controlnet.py evaluate oversample-${SEEDS%% *}.pt $real $test_set base-alone.npz real-masks-*.npz synthetic-*.npz "${groups[@]}" --out table1.csv
wait $pids
predictions=$(for row in $METHODS; do for n in $SEEDS; do echo "$row:$n=pred/$row-$n.npz"; done; done)
"$python" "$here/fairness.py" table $test_set $predictions "${groups[@]}" --out results.csv | tee log/table.txt | sed -n '/^mean Dice/,$p'
"$python" "$here/fairdiff.py" report .
echo "all of it in $SECONDS s, $seg steps of $batch images for a row: $OUT/report.html"
