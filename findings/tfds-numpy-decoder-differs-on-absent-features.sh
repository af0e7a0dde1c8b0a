#!/usr/bin/env bash
# Software: tensorflow-datasets 4.9.10, its two decoders of tf.train.Example: `deserialize_example`,
# which uses TensorFlow, and `deserialize_example_np`, which reads without it
#
# Behaviour: on an example that lacks a feature the two decoders disagree, in both directions.
# TensorFlow reads an absent sequence as empty; the other decoder raises a ValueError. An absent
# scalar is an error to TensorFlow; the other decoder returns None. And without its inner row lengths a list of lists of lists is an error to
# TensorFlow, and a list of arrays to the other.
#
# Expected: both decoders give the same values, or both raise.
#
# Seen (TensorFlow's / the other's):
#   absent sequence:          []  /  ValueError
#   absent scalar:            InvalidArgumentError  /  None
#   absent inner row lengths: InvalidArgumentError  /  [[1, 2], [3]]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tensorflow-datasets==4.9.10 \
    tensorflow-cpu==2.21.0 importlib_resources==7.1.0

cat >"$dir/decode.py" <<'PY'
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds


def integers(*values):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def plain(value):
    if hasattr(value, "to_list"):
        return value.to_list()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return np.asarray(value).tolist()


tags = tfds.features.Sequence(np.int64)
cube = tfds.features.Sequence(tfds.features.Sequence(tags))
cases = {
    "absent sequence": ("tags", tags, {}),
    "absent scalar": ("number", tfds.features.Scalar(np.int64), {}),
    "absent inner row lengths": (
        "cube",
        cube,
        {"cube/ragged_flat_values": integers(1, 2, 3), "cube/ragged_row_lengths_0": integers(2, 1)},
    ),
}
for case, (name, feature, stored) in cases.items():
    features = tfds.features.FeaturesDict({"label": np.int64, name: feature})
    stored = {"label": integers(1)} | stored
    example = tf.train.Example(features=tf.train.Features(feature=stored)).SerializeToString()
    seen = []
    for decode in (features.deserialize_example, features.deserialize_example_np):
        try:
            seen.append(str(plain(decode(example)[name])))
        except Exception as error:
            seen.append(type(error).__name__)
    print(f"{case}: {'  /  '.join(seen)}")
PY

cd "$dir"
TF_CPP_MIN_LOG_LEVEL=3 venv/bin/python decode.py 2>errors | tee seen || { cat errors >&2; exit 1; }
grep -qx 'absent sequence: \[\]  /  ValueError' seen
grep -qx 'absent scalar: InvalidArgumentError  /  None' seen
grep -qx 'absent inner row lengths: InvalidArgumentError  /  \[\[1, 2\], \[3\]\]' seen
