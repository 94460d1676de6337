#!/usr/bin/env bash
# Makes the data of four judges and trains them: bash configs/glyphs/judges.sh. They have four seeds and two architectures, and each never
# sees one family of typefaces. (Nor does any of them see the two test faces, which no model has seen.)
# The same command resumes. A judge takes about 15 minutes on one thread. RUN is the folder for all of it (default: runs/judges), and JUDGES
# names the judges to make (default: a b c d).
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
RUN=${RUN:-runs/judges}

judge() { # NAME SEED CONFIG UNSEEN_FACES...
  local name=$1 seed=$2 config=$3 data=$RUN/$1-glyphs
  shift 3
  stage "$name: pictures" "$PY" data/glyphs.py --out "$data" --split train test --num-train 30000 --num-test 2000 --seed "$seed" \
    --holdout-fonts "$@"
  stage "$name: training" "$PY" train.py "configs/glyphs/$config.yaml" run.dir="$RUN/$name" run.seed="$seed" data.train="$data/train" \
    data.val="$data/test"
}

for name in ${JUDGES:-a b c d}; do
  case $name in
    a) judge a 201 judge_resnet STIXGeneral STIXGeneralBol STIXGeneralBolIta STIXGeneralItalic ;;
    b) judge b 202 judge_resnet DejaVuSerif DejaVuSerif-Bold DejaVuSerif-BoldItalic DejaVuSerif-Italic ;;
    c) judge c 203 judge_densenet DejaVuSans DejaVuSans-Bold DejaVuSans-BoldOblique DejaVuSans-Oblique ;;
    d) judge d 204 judge_densenet cmb10 cmmi10 cmr10 cmti10 ;;
    *) echo "error: JUDGES names '$name', wanted some of a b c d" >&2; exit 2 ;;
  esac
done
print_times
