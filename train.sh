#!/usr/bin/env bash
# FairDiff from data to table: masks drawn for every group, images painted over them, an equal-scale
# training set, TransUNet trained with and without it, fairness measured.
#
#   bash train.sh                                  a GPU if CUDA works, else a laptop's two cores
#   SCALE=smoke bash train.sh                      every stage in a minute, results meaningless
#   DATA=path/to/fairseg bash train.sh             Harvard-FairSeg files instead of the phantom
#   ATTRIBUTE=gender OUT=out-gender SEED=1 bash train.sh
#   ATTRIBUTE=all OUT=out-all bash train.sh        Tables 2-5: one run an attribute, plain and judge trained once
#   METHODS=all SEEDS="0 1 2" bash train.sh        every row of the tables, each TransUNet trained three times
#   GPUS=4 SCALE=paper WEIGHTS=R50+ViT-B_16.npz DATA=path/to/fairseg bash train.sh
#
# RARE=30: only so many patients of the rarest race in training. GPUS: processes of torchrun, each with a GPU of its
# own. WEIGHTS: TransUNet's ImageNet-21k weights.
# The same command again skips complete stages and continues an interrupted one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
SCALE=${SCALE:-} ATTRIBUTE=${ATTRIBUTE:-race} DATA=${DATA:-} OUT=${OUT:-out} SEED=${SEED:-0}
METHODS=${METHODS:-} SEEDS=${SEEDS:-$SEED} SHARED=${SHARED:-$OUT} RARE=${RARE:-} WEIGHTS=${WEIGHTS:-} GPUS=${GPUS:-1}
rows="plain oversample adv groupdro fairseg equal synthetic-only oracle"
attributes="race gender ethnicity language maritalstatus age"
die() { echo "train.sh: $1" >&2; exit 2; }
stop() { kill $(jobs -p) 2>/dev/null && wait || true    # a stage in the background does not see Ctrl-C itself
  [ "$SHARED" != "$OUT" ] || printf '\n%s\n' "train.sh: interrupted; the same command again continues" >&2; exit 130; }
trap stop INT TERM
among() { case " $2 " in *" $1 "*) ;; *) die "$3=$1: expected all or any of $2" ;; esac }
[ "$ATTRIBUTE" = all ] || among "$ATTRIBUTE" "$attributes" ATTRIBUTE
case $SEEDS$SEED in *[!0-9\ ]*) die "SEED=$SEED SEEDS=$SEEDS: expected whole numbers from 0" ;; esac
[ -n "${SEEDS// }" ] || die "SEEDS: expected a whole number at least"
once_each() { [ -z "$(printf '%s\n' $2 | sort | uniq -d)" ] || die "$1=$2: one of them stands there twice"; }
once_each SEEDS "$SEEDS"
[ -z "$DATA" ] || [ -z "$RARE" ] || die "RARE=$RARE: a dial of the phantom, not of DATA=$DATA"
case $GPUS in '' | 0* | *[!0-9]*) die "GPUS=$GPUS: expected a whole number from 1" ;; esac

has_packages() { "$1" -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("torch", "numpy", "scipy", "PIL", "tqdm"))))' 2>/dev/null; }
python=python3                                          # the one at hand if it has the packages, else .venv
has_packages $python || python=$here/.venv/bin/python
if ! has_packages "$python"; then
  echo "installing the five packages of requirements.txt into .venv"
  python3 -m venv "$here/.venv" && "$python" -m pip install -q -r "$here/requirements.txt"
fi
why="as asked" cuda='import torch, sys; sys.exit(not torch.cuda.is_available())'
if [ -z "$SCALE" ] && command -v nvidia-smi >/dev/null && "$python" -c "$cuda"; then SCALE=gpu why="CUDA works"; fi
if [ -z "$SCALE" ]; then SCALE=cpu why="no working CUDA device"; fi

# One dial. size: pixels a side; train, test: phantom patients; then optimizer steps and batch of the point
# model, the base, the ControlNet and every TransUNet; draw: sampler steps; *_flags: what else a stage is told.
# share: how much of what a group lacks is synthetic, the rest repeats its real images (1: the paper's Eq. 6).
# mixes: equal-scale sets that are drawn and united, as many as epochs at cpu scale, so that no real image is cut for good.
# each: a point model for every group, as in the paper; default: the rows of the table.
points_flags="" draw_flags="" base_flags="" seg_flags="" share=0.5 mixes=5 each="" default="plain oversample equal oracle"
case $SCALE in
  smoke) size=32 train=96 test=60                       # every stage; the clouds may be --rough
         points=200 points_batch=16 base=20 control=20 image_batch=8 seg=20 seg_batch=8 draw_points=20 draw_images=4
         points_flags="--width 64 --lr 6e-3" draw_flags=--rough base_flags="--width 16" ;;
  cpu)   size=64 train=1000 test=2000                   # 92 patients of the rare group
         points=2800 points_batch=32 base=350 control=1300 image_batch=8 seg=280 seg_batch=16
         draw_points=32 draw_images=10 ;;
  gpu)   size=128 train=8000 test=2000 each=yes default=$rows     # the real data's size and proportions
         points=10000 points_batch=48 base=3000 control=6000 image_batch=48 seg=3000 seg_batch=48
         draw_points=100 draw_images=50 points_flags="--points 512" seg_flags="--optimizer sgd" ;;
  paper) size=224 train=8000 test=2000 each=yes default=$rows     # 3.1: 2 M steps of 48 at 1e-4; 300 epochs of 8,000
         points=2000000 points_batch=48 base=50000 control=100000 image_batch=48 seg=50000 seg_batch=48
         draw_points=100 draw_images=50 points_flags="--points 512 --lr 1e-4" seg_flags="--base --optimizer sgd" share=1 mixes=1 ;;
  *) die "SCALE=$SCALE: expected smoke, cpu, gpu or paper" ;;
esac
METHODS=${METHODS:-$default}
[ "$METHODS" != all ] || METHODS=$rows
for row in $METHODS; do among "$row" "$rows" METHODS; done
once_each METHODS "$METHODS"
if [ -n "$DATA" ]; then METHODS=${METHODS/oracle/}; fi  # only the phantom has as many real patients as we like
[ -n "${METHODS// }" ] || die "METHODS=oracle: expected another row, too: DATA=$DATA is no phantom"
if [ -n "$WEIGHTS" ]; then
  [ $SCALE = paper ] || die "WEIGHTS=$WEIGHTS: only SCALE=paper trains the network that they fit"
  [ -f "$WEIGHTS" ] || die "WEIGHTS=$WEIGHTS: no such file"
  seg_flags="$seg_flags --weights $WEIGHTS"
fi
dials="SCALE=$SCALE ATTRIBUTE=$ATTRIBUTE SEED=$SEED SEEDS='$SEEDS' METHODS='$METHODS' OUT=$OUT DATA=$DATA RARE=$RARE WEIGHTS=$WEIGHTS GPUS=$GPUS"
echo "$dials ($SCALE: $why)"

log=$OUT/log
mkdir -p "$log" 2>/dev/null || die "OUT=$OUT: cannot make this folder"
exec 9> "$log/lock"                                     # held until this run and its stages have ended
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
  die "OUT=$OUT: another run is at work here: wait for its end or choose another OUT"
find "$OUT" -name '.*.[0-9]*.part' -delete              # what a killed run had half written
echo "$dials bash train.sh" > "$log/command.txt"
export PYTHONUNBUFFERED=1
stage() {                                               # stage NAME FILE.py ARGUMENTS...: run once, keep its log
  local name=$1 file=$2 started=$SECONDS several=""; shift 2
  case $GPUS,$file in 1,* | *,fair*) ;; *) several="-m torch.distributed.run --standalone --nproc_per_node=$GPUS" ;; esac
  if [ -f "$log/$name.done" ]; then
    if [ "$(sed -n 2p "$log/$name.done")" = "$file $*" ]; then echo "== $name: complete, skipped"; return; fi
    [ $name = table ] ||                                # METHODS and SEEDS may grow
      die "$OUT holds stage $name of another configuration: choose another OUT, or remove $OUT"
  fi
  echo "== $name: $file $*"
  "$python" $several "$here/$file" "$@" | tee "$log/$name.txt" &
  wait %%
  printf '%s\n%s\n' "$((SECONDS - started))" "$file $*" > "$log/$name.done.part"
  mv "$log/$name.done.part" "$log/$name.done"
}
once() { local log=$SHARED/log; stage "$@"; }           # what the attributes share

if [ "$ATTRIBUTE" = all ]; then
  for a in $attributes; do SHARED=$OUT SCALE=$SCALE ATTRIBUTE=$a OUT=$OUT/$a bash "$here/train.sh"; done
  gather() { for a in $attributes; do cat "$OUT/$a/$1"; done > "$OUT/$2"; }
  for f in score mix agree quality table; do [ ! -f "$OUT/race/log/$f.txt" ] || gather log/$f.txt log/$f.txt; done
  gather tables.md tables.md
  gather results.csv results.part && awk 'NR == 1 || !/^attribute,/' "$OUT/results.part" > "$OUT/results.csv"
  rm "$OUT/results.part"
  "$python" "$here/fairdiff.py" report "$OUT"; exit
fi
real=$SHARED/data/train.npz testset=$SHARED/data/test.npz seed="--seed $SEED" group="--attribute $ATTRIBUTE"

# 1. The data. The oracle's set is real, balanced and of the same size: the most that synthesis could buy.
if [ -n "$DATA" ]; then
  once data fairdiff.py fairseg "$DATA" --out "$SHARED/data" --size $size
else
  once data fairdiff.py phantom --out "$SHARED/data" --train $train --test $test --size $size $seed ${RARE:+--rare $RARE}
  stage oracle-data fairdiff.py phantom --out "$OUT/oracle" --train $train --test 0 --size $size $seed --balance "$ATTRIBUTE"
fi
# 2. Points to masks (Section 2.2).
fit="--steps $points --batch $points_batch $points_flags $seed" models=()
if [ -z "$each" ]; then
  models=("$OUT/points.pt")
  stage points pointdiff.py train "$real" $group $fit --out "$OUT/points.pt"
else
  present='import sys, fairdiff as f; c, names = f.group_codes(f.load_set(sys.argv[1]), sys.argv[2])
print(*(names[g] for g in sorted(set(c)) if g >= 0), sep="\n")'
  while read -r name <&3; do
    model=points-${#models[@]} models+=("$OUT/points-${#models[@]}.pt")
    stage $model pointdiff.py train "$real" $group --group "$name" $fit --out "$OUT/$model.pt"
  done 3< <(PYTHONPATH=$here "$python" -c "$present" "$real" "$ATTRIBUTE")
fi
stage masks pointdiff.py sample "${models[@]}" --steps $draw_points $draw_flags $seed --out "$OUT/masks.npz"
[ $SCALE = smoke ] ||                                   # whose clouds are no outlines yet
  stage score pointdiff.py score "${models[@]}" "$real" "$testset" --n 92 --steps $draw_points $seed --out "$OUT/points.csv"
# 3. Masks to images (Section 2.3). The plain TransUNet, the table's first row, reads some along the way.
images="--batch $image_batch $seed" seg_args="--steps $seg --batch $seg_batch $seg_flags"
once plain transunet.py train "$real" --method plain $seg_args $seed --out "$SHARED/plain.pt"
stage base controlnet.py train-base "$real" $group --steps $base $base_flags $images --out "$OUT/base.pt"
stage control controlnet.py train-control "$real" "$OUT/base.pt" --reader "$SHARED/plain.pt" --steps $control $images --out "$OUT/control.pt"
stage synthetic controlnet.py sample "$OUT/control.pt" "$OUT/masks.npz" --steps $draw_images $seed --out "$OUT/synthetic.npz"
# 4. Equal Scale (Section 2.4).
stage mix fairdiff.py mix "$real" "$OUT/synthetic.npz" $group --share $share --mixes $mixes $seed --out "$OUT/mixed.npz"
# 5. TransUNet, every row for the same number of steps (Section 3), and a judge of another width and seed that
#    only reports. Eq. 2 is not solved jointly: theta is fitted last, on what phi and psi have drawn.
predictions=()
for row in $METHODS; do
  method=plain set=$real knows=$group at=$OUT run=stage
  case $row in
    plain) knows="" at=$SHARED run=once ;;
    equal) set=$OUT/mixed.npz ;;
    synthetic-only) set=$OUT/synthetic.npz ;;           # as many images as the real set, groups equal
    oracle) set=$OUT/oracle/train.npz ;;
    *) method=$row ;;
  esac
  for s in $SEEDS; do
    name=$row; [ $s = $SEED ] || name=$row-$s
    $run $name transunet.py train "$set" --method $method $knows $seg_args --seed $s --out "$at/$name.pt"
    $run predict-$name transunet.py predict "$at/$name.pt" "$testset" --out "$at/pred/$name.npz"
    predictions+=("$row:$s=$at/pred/$name.npz")
  done
done
knows=$group; [ "$SHARED" = "$OUT" ] || knows=""        # the shared judge knows race
once judge transunet.py train "$real" --method oversample $knows --width 24 --steps $seg --batch $seg_batch \
  --seed $((SEED + 1000)) --out "$SHARED/judge.pt"
# 6. The figures.
stage agree controlnet.py agree "$SHARED/judge.pt" "$OUT/synthetic.npz" "$testset" $group --out "$OUT/agreement.csv"
stage quality controlnet.py quality "$SHARED/judge.pt" "$OUT/base.pt" "$OUT/control.pt" "$OUT/synthetic.npz" "$real" "$testset" --steps $draw_images $seed --out "$OUT/table1.csv"
stage table fairness.py table "$testset" "${predictions[@]}" $group --out "$OUT/results.csv"
"$python" "$here/fairdiff.py" report "$OUT"

for f in score mix agree quality table; do [ ! -f "$log/$f.txt" ] || { echo; cat "$log/$f.txt"; }; done
echo; echo "pictures:"; find "$OUT" -name '*.png' | sort
echo "seconds:"
for f in "$log"/*.done; do printf '%7s %s\n' "$(sed -n 1p "$f")" "$(basename "$f" .done)"; done | sort -n
echo "all of it in ${SECONDS} s: $OUT/report.html"
