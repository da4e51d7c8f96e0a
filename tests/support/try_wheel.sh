#!/usr/bin/env bash
# Installs a wheel into a fresh environment, where no nvcc is to be found, and tries it: tests/support/try_wheel.sh dist/*.whl
# ENVIRONMENT names the folder (default: build/wheel-environment), PYTHON the interpreter. What pip installs is what a user gets.
set -euo pipefail
cd "$(dirname "$0")/../.."
environment=${ENVIRONMENT:-build/wheel-environment}
rm -rf "$environment"
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/pip" install --disable-pip-version-check --quiet "$1"
environment=$(realpath "$environment") tests=$(realpath tests/support)
cd "$(mktemp -d)"  # not where the sources are
export PATH="$environment/bin:/usr/bin:/bin"
unset CUDACXX CUDA_HOME PYTHONPATH
python "$tests/try_installed.py"
barlow-fused doctor
rm -rf "$environment"  # gigabytes, most of it PyTorch
