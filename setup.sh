#!/bin/sh
# Everything a fresh machine needs: .venv with the packages of a requirements file, and on Linux an OpenBLAS (see engine/blas.py).
#   sh setup.sh [requirements.txt]      CUDA=1 takes MLX's CUDA backend on Linux
set -eu
requirements=${1:-requirements.txt}
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv || { echo "error: no virtual environment; on Debian run: apt-get install python3-venv" >&2; exit 2; }
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" 2>&1 | grep -v '^WARNING: Location' || true
[ -z "${CUDA:-}" ] || { .venv/bin/python -m pip install --quiet "mlx[cuda13]>=0.32,<0.33" && .venv/bin/python -m pip uninstall --quiet --yes mlx-cpu; }
.venv/bin/python -c 'import mlx.core, scipy, matplotlib, tokenizers, sentencepiece, jinja2, yaml' || { echo "error: packages are missing; see pip's messages above" >&2; exit 2; }
if [ "$(uname -s)" = Linux ] && [ -z "${CUDA:-}" ] && ! .venv/bin/python -c 'import engine.blas, sys; sys.exit(not engine.blas.LOADED)' 2>/dev/null; then
    if [ "$(id -u)" = 0 ]; then root=""; else root="sudo -n"; fi
    echo "installing libopenblas0 (MLX trains about ten times faster with it)"
    { $root apt-get update -qq && $root apt-get install -qq -y libopenblas0; } >/dev/null 2>&1 ||
        echo "note: could not install libopenblas0; all works, slower. By hand: sudo apt-get install libopenblas0"
fi
few_rows() { cc -O3 -fopenmp -shared -fPIC "-march=$2" -o .venv/lib/few_rows.tmp engine/few_rows.c && mv .venv/lib/few_rows.tmp ".venv/lib/libfew_rows$1.so"; }
rm -f .venv/lib/lib*_row*.so
if [ "$(uname -s)" = Linux ] && [ -z "${CUDA:-}" ]; then    # for each kind of processor, since a folder may move to another machine
    case "$(uname -m)" in x86_64) few_rows Haswell haswell && few_rows SkylakeX skylake-avx512 ;; *) few_rows "" armv8-a ;; esac 2>.venv/few_rows.log ||
        echo "note: could not compile engine/few_rows.c ($(head -n 1 .venv/few_rows.log)); all works, decoding takes a third longer. Without a compiler: sudo apt-get install gcc, then sh setup.sh"
fi
