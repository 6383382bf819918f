#!/usr/bin/env bash
# By hand: every lower bound of requirements.txt in a scratch environment, which edits the demo and runs the
# tests of reading and writing. bash tests/bounds.sh (some minutes; PYTHON=python3.12 chooses another Python)
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -E '/^#/d; s/>=([0-9.]+).*/==\1/' requirements.txt | tee "$work/lowest.txt"
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet -r "$work/lowest.txt"
export HF_HUB_OFFLINE=1 PYTHONNOUSERSITE=1
for script in sample metrics curate train; do "$work/venv/bin/python" $script.py --help >/dev/null; done
"$work/venv/bin/python" sample.py assets/demo.mp4 "make it snow" --model tiny --frames 20 --device cpu --out "$work/edit.mp4"
"$work/venv/bin/python" -m pytest -q -x tests/test_sample.py
