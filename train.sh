#!/usr/bin/env bash
# FairDiff end to end: generate masks, an image for each, top up the small groups, train TransUNet, measure fairness.
#   bash train.sh                                      phantom data, a GPU if there is one; again: skips what is done
#   METHODS="plain equal" SEEDS="0 1 2" bash train.sh  rows of the table (or all), trainings of each; all settings: README
#   DATA=path/to/fairseg bash train.sh                 Harvard-FairSeg (CROP, SPLIT, SKIP_BAD=1) or your own sets
#   SCALE=paper GPUS=4 WEIGHTS=R50+ViT-B_16.npz DATA=path/to/fairseg bash train.sh
set -meuo pipefail                                      # m: a process group a job, which the trap can end as a whole
OUT=${OUT:-out} ATTRIBUTE=${ATTRIBUTE:-race} SEED=${SEED:-0} SEEDS=${SEEDS:-$SEED} GPUS=${GPUS:-1} CROP=${CROP:-512}
unset RANK WORLD_SIZE LOCAL_RANK OMP_NUM_THREADS CDPATH # of other launchers: nothing but the settings steers a run
here=$(cd "$(dirname "$0")" && pwd) all="plain oversample groupdro adv fairseg equal balanced no-points oracle"
. "$here/.ci/python.sh" "$here/.venv" "torch.nn, numpy, scipy.ndimage, PIL.Image, tqdm" "$here/requirements.txt"
SCALE=${SCALE:-$("$python" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')}
die() { echo "train.sh: $1" >&2; exit 2; }
lanes=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) methods="plain twice oversample equal oracle" models=all network="" files=""
# points, base, control, seg: training steps; masks, images: sampling steps; lanes: jobs side by side; models: all, or of each group
case $SCALE in
  smoke) size=32 train=96 test=60 rare="" batch=8 points=60 base=10 control=10 seg=10 masks="8 --keep-invalid" images=4 ;;
  cpu) size=64 train=1000 test=2000 rare=30 batch=8 points=1200 base=200 control=2200 seg=1120 masks=32 images=8 ;;
  gpu) size=128 train=8000 test=2000 rare="" batch=48 points=3000 base=2000 control=4000 seg=2000 masks=32 images=20 lanes=4 models="" methods=all ;;
  paper) size=224 train=8000 test=2000 rare="" batch=48 points="2000000 --batch 48 --lr 1e-4 --points 512" base=50000 control=100000 seg=50000 masks="32 --points 512" images=20 lanes=1 models="" methods=all network="--base --optimizer sgd" ;;
  *) die "SCALE=$SCALE: expected smoke, cpu, gpu or paper" ;;
esac
METHODS=" $(echo ${METHODS:-$methods}) oversample" METHODS=${METHODS/ all / $all } SEEDS=$(echo $SEEDS) RARE=${RARE:-$rare}     # oversample: the judge
for n in "$SEED" ${SEEDS:-none} "$GPUS" "${RARE:-1}"; do [[ $n =~ ^(0|[1-9][0-9]*)$ && $GPUS != 0 && $RARE != 0 ]] || die "SEED=$SEED SEEDS=$SEEDS GPUS=$GPUS RARE=$RARE: expected numbers, the last two above 0"; done
[ -z "$(printf '%s\n' $SEEDS | sort | uniq -d)" ] || die "SEEDS=$SEEDS: expected each once"
for row in $METHODS; do [[ " $all twice " == *" $row "* ]] || die "METHODS=$METHODS: expected some of: all $all twice"; done
for name in DATA SPLIT WEIGHTS; do file=${!name:-}; [[ -z $file || $file == /* ]] || file=$PWD/$file; printf -v $name %s "$file"; done
[[ -z $WEIGHTS || $SCALE == paper && $("$python" -m zipfile -l "$WEIGHTS" 2>&1) == *conv_root/kernel* ]] || die "WEIGHTS=$WEIGHTS SCALE=$SCALE: expected R50+ViT-B_16.npz and paper"
[ -z "$DATA" ] || METHODS=${METHODS//oracle/} files=$(find -L "$DATA" -type f -exec cksum {} + 2> /dev/null | LC_ALL=C sort | cksum) || die "DATA=$DATA: cannot be read"
mkdir -p "$OUT/log"; cd "$OUT"                          # all paths are relative to it, so that it may be moved
stage() { # NAME FILE COMMAND ARGS...: run one command, keep what it prints, skip it the next time
  local name=$1 done=log/$1.done started=$SECONDS launch="" line=$'\n' settings changes; shift
  [[ $GPUS == 1 || $2 != train* ]] || launch="-m torch.distributed.run --standalone --nproc_per_node=$GPUS"
  settings="$launch $* --checksum of DATA $files" settings=${settings// --/$line--}             # an option a line
  changes=$(diff <(echo "$settings") $done 2> /dev/null) && echo "== $name: done" && return
  [ ! -f $done ] || die "OUT=$OUT: $name had other settings (now <, then >): $(grep '^[<>]' <<< "$changes" | tr '\n' ' ')- choose another OUT"
  echo "== $name: $*"
  OMP_NUM_THREADS=1 "$python" $launch "$here/$1" "${@:2}" > log/$name.txt
  printf '%6d s  %s\n' $((SECONDS - started)) "$name" | tee -a log/seconds.txt
  echo "$settings" > $done
}
beside() { # COMMAND: run it beside the others as soon as a lane is free; should it fail, all ends (bash 3.2 has no wait for any)
  while [ "$(jobs -rp | wc -l)" -ge $lanes ]; do sleep 0.2; done
  { trap '[ $? = 0 ] || kill -USR1 $$' EXIT; "$@"; } &
}
trap 'exit 2' USR1; trap 'for p in $(jobs -p); do kill -- -$p 2> /dev/null || true; done' EXIT
each() { while read -r n group <&3; do eval "$1"; done 3<<< "$models"; } # 'COMMAND' for every model: $n, its name, and $group, if it is of one
# 1. Data; the oracle is topped up with fresh real patients, which only the phantom has
real=data/train.npz test_set=data/test.npz groups=(--attribute "$ATTRIBUTE") seed="--seed $SEED"
data=(split "$DATA")                                    # a set of one's own
[[ -f $DATA || -f $DATA/train.npz ]] || data=(fairseg "$DATA" --size $size --crop "$CROP" ${SPLIT:+--split "$SPLIT/train.txt" "$SPLIT/test.txt"} ${SKIP_BAD:+--skip-bad})
[ -n "$DATA" ] || data=(phantom --size $size --train $train --test $test $seed ${RARE:+--rare $RARE})
stage data fairdiff.py "${data[@]}" "${groups[@]}" --out data
[ -n "$DATA" ] || beside stage fresh fairdiff.py phantom --size $size --train $train --test 0 $seed --balance "$ATTRIBUTE" "${groups[@]}" --out fresh
# 2. Points to masks (Section 2.2), 3. masks to images (Section 2.3)
points() {
  stage points-$n pointdiff.py train $real "${groups[@]}" ${group:+--group "$group"} --steps $points $seed --out points-$n.pt
  stage masks-$n pointdiff.py sample points-$n.pt --steps $masks $seed --out masks-$n.npz
  stage score-masks-$n pointdiff.py evaluate masks-$n.npz $real $test_set "${groups[@]}" --out masks-$n.csv
}
[ -n "$models" ] || models=$("$python" -c 'import numpy, sys; print(*sorted(set(numpy.load(sys.argv[1])[sys.argv[2]]) - {""}), sep="\n")' $real "$ATTRIBUTE" | cat -n)
each 'beside points'
beside stage base controlnet.py train-base $real "${groups[@]}" --steps $base --batch $batch $seed --out base.pt; wait $!
each 'beside stage control-$n controlnet.py train-control $real base.pt ${group:+--group "$group"} --steps $control --batch $batch $seed --out control-$n.pt'; generators=$(jobs -p)
# 4. TransUNet (Section 3), and meanwhile the rest of 3; every row of the tables but twice takes the same number of steps
row() {
  local set=$real method=$1 steps=$seg
  case $1 in
    twice) method=plain steps=$((2 * seg)) ;;           # to see whether training was long enough
    equal | oracle | no-points) method=plain set=$1.npz ;;
    balanced) set=equal.npz ;;
  esac
  stage $1-$2 transunet.py train $set --method $method $network "${groups[@]}" --steps $steps --batch $batch --seed $2 ${WEIGHTS:+--weights "$WEIGHTS"} --out $1-$2.pt
  stage predict-$1-$2 transunet.py predict $1-$2.pt $test_set --out pred/$1-$2.npz
}
rows() { for method in "$@"; do for s in $SEEDS; do [[ " $METHODS " != *" $method "* ]] || beside row $method $s; done; done; }
rows oversample plain twice                             # they need no generated images and fill the lanes meanwhile
beside stage base-alone controlnet.py sample base.pt $real --n 100 --steps $images $seed --out base-alone.npz
wait $generators || true                                # one that failed has sent its signal
each 'beside stage synthetic-$n controlnet.py sample control-$n.pt masks-$n.npz --steps $images $seed --out synthetic-$n.npz'; synthetic=$(jobs -p)
each 'beside stage real-masks-$n controlnet.py sample control-$n.pt $real --equal --steps $images $seed --out real-masks-$n.npz'; drawn=$(jobs -p)
[ -n "$DATA" ] || stage oracle fairdiff.py mix $real fresh/train.npz "${groups[@]}" $seed --out oracle.npz
wait $synthetic || true
# 5. Equal Scale (Section 2.4, Eq. 6), and the same over the masks of training images: without the point model
stage equal fairdiff.py mix $real synthetic-*.npz "${groups[@]}" $seed --out equal.npz
[[ $METHODS != *no-points* ]] || { wait $drawn || true; stage no-points fairdiff.py mix $real real-masks-*.npz "${groups[@]}" $seed --out no-points.npz; }
rows groupdro adv fairseg equal balanced oracle no-points
# 6. Evaluation: images (Table 1), segmentation (Tables 2-5), one page with everything
wait $drawn || true
beside stage score-images controlnet.py evaluate oversample-${SEEDS%% *}.pt $real $test_set base-alone.npz real-masks-*.npz synthetic-*.npz "${groups[@]}" --out table1.csv
wait
predictions=$(for row in $METHODS; do for n in $SEEDS; do echo "$row:$n=pred/$row-$n.npz"; done; done)
"$python" "$here/fairness.py" table $test_set $predictions "${groups[@]}" --out results.csv | tee log/table.txt | sed -n '/^mean Dice/,$p'
"$python" "$here/fairdiff.py" report .
echo "all of it in $SECONDS s, $seg steps of $batch images for a row: $OUT/report.html"
