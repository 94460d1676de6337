# Sourced by the demos: goes to the repository, and defines
#   stage NAME COMMAND...  runs a command under a heading, and keeps its time
#   print_times            prints the times of all stages of this call
# PY is the Python to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PY=${PY:-python}
export PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1
stage_times=()

stage() {
  local name=$1 start=$SECONDS
  shift
  printf '\n== %s ==\n%s\n' "$name" "$*"
  "$@"
  stage_times+=("$(printf '%-28s %4d s' "$name" $((SECONDS - start)))")
}

print_times() {
  printf '\n== times of this call ==\n'
  printf '%s\n' "${stage_times[@]}"
  printf 'all: %d s\n' "$SECONDS"
}
