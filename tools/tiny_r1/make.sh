#!/usr/bin/env bash
# Makes tiny-r1 from nothing: corpus -> tokenizer -> training -> export -> goldens. See README.md.
#   tools/tiny_r1/make.sh OUT [MAIN_MINUTES [MTP_MINUTES]]
set -euo pipefail
out=${1:?usage: make.sh OUT [MAIN_MINUTES [MTP_MINUTES]]}
main_minutes=${2:-45}
mtp_minutes=${3:-15}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"

if [ ! -x "$out/venv/bin/python" ]; then
  echo "installing torch, transformers and tokenizers into $out/venv"
  python3 -m venv "$out/venv"
  "$out/venv/bin/pip" install --quiet -r "$here/requirements.txt"
fi
python=$out/venv/bin/python

"$python" "$here/tokenizer_build.py" "$out/tokenizer.json"
"$python" "$here/train.py" "$out/tokenizer.json" "$out/checkpoint.pt" "$main_minutes" "$mtp_minutes"
"$python" "$here/export.py" "$out/tokenizer.json" "$out/checkpoint.pt" "$out"
"$python" "$here/golden.py" "$out" "$out/small.safetensors" 31337 3
"$python" "$here/golden.py" "$out" "$out/more.safetensors" 4242 12
