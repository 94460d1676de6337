#!/usr/bin/env bash
# The whole method in small, from the shipped glyphs-base to anagrams: what `make demo` runs. A second call resumes.
#   PY   the Python to use          RUN  the folder to write (default runs/demo); both as seen from the repository
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
RUN=${RUN:-runs/demo}
BASE=eqldm/pretrained/glyphs-base

stage "1 glyphs" "$PY" data/glyphs.py --out "$RUN/glyphs" --split train val test \
  --num-train 8000 --num-val 512 --num-test 512 --shard-size 1000
stage "2 equivariant autoencoder" "$PY" train.py configs/glyphs/demo_vae.yaml run.dir="$RUN/vae" \
  data.train="$RUN/glyphs/train" data.val="$RUN/glyphs/val"
stage "3 swap, nothing trained" "$PY" -m eqldm.swap "$BASE" --vae "$RUN/vae/model" --out "$RUN/swap/model"
for split in train val; do
  stage "4 latents ($split)" "$PY" data/encode_latents.py --data "$RUN/glyphs/$split" --model "$RUN/vae/model" \
    --out "$RUN/latents/$split"
done
stage "5 adapted UNet" "$PY" train.py configs/glyphs/demo_unet.yaml run.dir="$RUN/adapted" vae="$RUN/vae/model" \
  data.train="$RUN/latents/train" data.val="$RUN/latents/val"
stage "6 anagrams" "$PY" sample.py --model "$RUN/adapted/model" --prompts "the letter A" "the letter V" \
  --views identity rotate_180 --num-samples 8 --out "$RUN/anagrams"
stage "7 evaluation" "$PY" -m eqldm.evaluate "$RUN/swap/model" "$RUN/adapted/model" --baseline "$BASE" --data "$RUN/glyphs/test" \
  --num-images 256 --num-pairs 96 --without lpips --out "$RUN/evaluation"

print_times
printf '\nLook at the anagrams: %s, and at the models side by side: %s\n' "$RUN/anagrams/index.html" \
  "$RUN/evaluation/report.html"
