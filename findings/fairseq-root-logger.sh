#!/usr/bin/env bash
# fairseq-fixed 0.12.3.1: `import fairseq` imports every model it ships, and one of those modules calls
# `logging.basicConfig(level=logging.DEBUG)` as it is imported. From then on the root logger of the whole program
# prints debug messages of all libraries to stderr, and the program's own `logging.basicConfig` after the import is
# ignored.
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3}" -m venv "$dir/venv"
cd "$dir"
venv/bin/pip install --quiet fairseq-fixed==0.12.3.1 torch==2.14.1 torchaudio==2.11.0 numpy==2.3.5 >pip.log 2>&1 ||
  { cat pip.log; exit 2; }

cat >check.py <<'EOF'
import logging
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
root = logging.getLogger()
before = logging.getLevelName(root.level), len(root.handlers)
import fairseq  # noqa: E402

after = logging.getLevelName(root.level), len(root.handlers)
logging.basicConfig(level=logging.ERROR, format="mine: %(message)s")
own = logging.getLevelName(root.level)
print("fairseq-fixed", version("fairseq-fixed"))
print("root logger before the import (level, handlers):", before)
print("root logger after the import:                   ", after)
print("after basicConfig(level=ERROR) of the program:  ", own)
logging.getLogger("another.library").debug("a debug message of another library, printed")
assert before == ("WARNING", 0) and after == ("DEBUG", 1) and own == "DEBUG"
print("expected: an import that leaves the root logger alone, at WARNING without handlers")
EOF
venv/bin/python -W ignore check.py 2>&1
