#!/usr/bin/env bash
# Make the virtual environment .venv in the checkout, or take the one that is there, and install the
# package with its tested versions. Sourced by quickstart.sh and test.sh; EXTRAS names what else to install.
#
# Needs Python 3.11 or later with venv, a C++ compiler, and a package index. Ninja comes with DeepSpeed.

PYTHON=${PYTHON:-python3}

fail() {
  echo "error: $*" >&2
  exit 1
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python 3.11 or later is needed; $PYTHON is $("$PYTHON" --version 2>&1 || echo missing); set PYTHON to another"
command -v c++ >/dev/null || command -v g++ >/dev/null ||
  fail "a C++ compiler is needed (DeepSpeed builds one small extension); install g++"

if [ ! -x .venv/bin/python ]; then
  "$PYTHON" -m venv .venv || fail "the virtual environment could not be made; on Debian install python3-venv"
fi
# shellcheck disable=SC1091
source .venv/bin/activate

# The environment's own folder for what DeepSpeed compiles: the default is shared with other environments.
export TORCH_EXTENSIONS_DIR="$PWD/.torch_extensions"
export PIP_DISABLE_PIP_VERSION_CHECK=1

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  HAS_GPU=1
else
  HAS_GPU=
  # torch first and alone: with the pin pip takes the CPU build where one is offered, and no later
  # requirement replaces it by several GB for GPUs that are not there.
  python -c 'import torch' 2>/dev/null ||
    pip install --quiet --constraint launch/constraints.txt torch || fail "torch could not be installed"
  export DS_ACCELERATOR=cpu
fi
pip install --quiet --constraint launch/constraints.txt --editable ".${EXTRAS:-}" ||
  fail "the package could not be installed"
