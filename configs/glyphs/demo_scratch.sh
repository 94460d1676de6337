#!/usr/bin/env bash
# The whole pipeline on the glyph world, from nothing to anagrams: what `make demo-scratch` runs. A second call resumes.
#   PY   the Python to use          RUN  the folder to write (default runs/scratch); both as seen from the repository
source "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
RUN=${RUN:-runs/scratch}

stage "1 glyphs" "$PY" data/glyphs.py --out "$RUN/glyphs" --split train val test \
  --num-train 8000 --num-val 512 --num-test 512 --shard-size 1000 --variation 0.3 --colours blue yellow white \
  --train-faces DejaVuSans DejaVuSans-Bold DejaVuSerif DejaVuSerif-Bold STIXGeneral cmb10
stage "2 plain autoencoder" "$PY" train.py configs/glyphs/scratch_vae_plain.yaml run.dir="$RUN/vae-plain" \
  data.train="$RUN/glyphs/train" data.val="$RUN/glyphs/val"
stage "3 equivariant autoencoder" "$PY" train.py configs/glyphs/scratch_vae_eq.yaml run.dir="$RUN/vae-eq" \
  model="$RUN/vae-plain/model" data.train="$RUN/glyphs/train" data.val="$RUN/glyphs/val"
for split in train val; do
  stage "4 latents ($split)" "$PY" data/encode_latents.py --data "$RUN/glyphs/$split" --model "$RUN/vae-eq/model" \
    --out "$RUN/latents/$split"
done
stage "5 UNet" "$PY" train.py configs/glyphs/scratch_unet.yaml run.dir="$RUN/ldm-eq" vae="$RUN/vae-eq/model" \
  data.train="$RUN/latents/train" data.val="$RUN/latents/val"
stage "6 anagrams" "$PY" sample.py --model "$RUN/ldm-eq/model" --prompts "the letter A" "the letter V" \
  --views identity rotate_180 --num-samples 8 --out "$RUN/anagrams"
stage "7 evaluation" "$PY" -m eqldm.evaluate "$RUN/vae-plain/model" "$RUN/ldm-eq/model" --data "$RUN/glyphs/test" \
  --num-images 128 --num-pairs 96 --without lpips --out "$RUN/evaluation"

print_times
printf '\nLook at the anagrams: %s and %s\n' "$RUN/anagrams/index.html" \
  "$RUN/evaluation/ldm-eq/anagrams_rotate_180.png"
