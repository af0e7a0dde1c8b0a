#!/usr/bin/env bash
# Software: tensorstore 0.1.86, the storage of Orbax's checkpoints (kvstore driver "ocdbt")
#
# Behaviour: a folder of an OCDBT database that was copied without its manifest.ocdbt opens without
# an error. It lists no key, and every key reads as missing, although all data files are there.
# After an emptied manifest, the same calls raise. So a reader that checks a copy by opening it and
# reading every key that is listed finds an incomplete copy intact.
#
# Expected: an error, at the latest when the data files are met without a manifest.
#
# Seen:
#   whole: 3 keys, 'a' reads as 'value'
#   manifest emptied: DATA_LOSS
#   manifest missing: 0 keys, 'a' reads as 'missing', 1 data file is there
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tensorstore==0.1.86 numpy==2.4.6

cat >"$dir/read.py" <<'PY'
import pathlib
import shutil

import tensorstore as ts


def open_store(folder):
    return ts.KvStore.open({"driver": "ocdbt", "base": f"{folder.absolute().as_uri()}/"}).result()


whole = pathlib.Path("whole")
with ts.Transaction() as transaction:
    store = open_store(whole).with_transaction(transaction)
    for key in "abc":
        store[key] = key * 5000
for case in ("whole", "manifest emptied", "manifest missing"):
    copy = whole if case == "whole" else pathlib.Path(shutil.copytree(whole, case))
    if case == "manifest emptied":
        (copy / "manifest.ocdbt").write_bytes(b"")
    if case == "manifest missing":
        (copy / "manifest.ocdbt").unlink()
    files = sum(path.is_file() for path in copy.glob("d/*"))
    try:
        store = open_store(copy)
        keys = store.list().result()
        said = f"{len(keys)} keys, 'a' reads as {store.read('a').result().state!r}"
        said += f", {files} data file is there" if case == "manifest missing" else ""
    except Exception as error:
        said = str(error).partition(":")[0]
    print(f"{case}: {said}")
PY

cd "$dir"
venv/bin/python read.py | tee seen
grep -qx "whole: 3 keys, 'a' reads as 'value'" seen
grep -qx "manifest emptied: DATA_LOSS" seen
grep -qx "manifest missing: 0 keys, 'a' reads as 'missing', 1 data file is there" seen
