#!/usr/bin/env bash
# pytest 9.2.0 with pytest-xdist 3.8.0: `--dist loadgroup` should send all tests of an `xdist_group` to
# one worker. xdist marks the groups by writing to a private field of each test, `_nodeid`, from which
# pytest no longer makes `nodeid`. Nothing fails and nothing warns: tests of one group run on all
# workers, and what they share (a port, a database, what was compiled) is set up by each of them.
# With pytest 9.0.2 the same file runs on one worker.
#
# Seen on 2026-11-28:
#   pytest 9.0.2: one group on 1 worker(s)
#   pytest 9.2.0: one group on 2 worker(s)
#
# Here: tests are distributed by file (`--dist loadfile`), which does not need the field.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/test_group.py" <<'PYTHON'
import time

import pytest


@pytest.mark.xdist_group('one')
@pytest.mark.parametrize('i', range(8))
def test_in_a_group(i, worker_id, record_property):
  time.sleep(0.2)
  record_property('worker', worker_id)
PYTHON
workers_with() {
  python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q "pytest==$1" 'pytest-xdist==3.8.0'
  (cd "$folder" && "$folder/$1/bin/pytest" -q -n 2 --dist loadgroup --junitxml="$1.xml" test_group.py >/dev/null)
  grep -o 'name="worker" value="[a-z0-9]*"' "$folder/$1.xml" | sort -u | wc -l
}
before=$(workers_with 9.0.2) after=$(workers_with 9.2.0)
echo "pytest 9.0.2: one group on $before worker(s)"
echo "pytest 9.2.0: one group on $after worker(s)"
[ "$before" = 1 ] && [ "$after" = 2 ]
