"""T5X checkpoints, read from files that T5X wrote and from broken copies of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import serialization
from orbax import checkpoint as ocp

from ptjax.errors import InputError
from ptjax.interop import t5x

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
QUERY = "encoder/layers_0/attention/query/kernel"
QUERY_FOLDER = "target.encoder.layers_0.attention.query.kernel"


@pytest.fixture
def legacy(tmp_path):
    """A copy of T5X's legacy checkpoint that a test may break."""
    return pathlib.Path(
        shutil.copytree(FIXTURES / "t5_1_1_tiny_legacy/checkpoint_3", tmp_path / "checkpoint_3")
    )


@pytest.fixture
def orbax(tmp_path):
    return pathlib.Path(
        shutil.copytree(FIXTURES / "t5_1_1_tiny_orbax/checkpoint_3", tmp_path / "checkpoint_3")
    )


def edit_msgpack(checkpoint, change):
    """Rewrites the `checkpoint` file with `change` applied to its contents in place."""
    file = checkpoint / "checkpoint"
    contents = serialization.msgpack_restore(file.read_bytes())
    change(contents)
    file.write_bytes(serialization.msgpack_serialize(contents))


def leaf_of(contents, name):
    """(dict that holds the leaf, its key)."""
    node = contents["optimizer"]["target"]
    *folders, key = name.split("/")
    for folder in folders:
        node = node[folder]
    return node, key


def write_checkpoint(checkpoint, arrays, chunks=None):
    """A legacy checkpoint as T5X lays it out; 1-D arrays stay in the msgpack, as Google's do."""
    target = {}
    for name, value in arrays.items():
        node = target
        *folders, key = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        if value.ndim == 1:
            node[key] = value
            continue
        path = f"target.{name.replace('/', '.')}"
        metadata = {
            "chunks": list(chunks or value.shape),
            "compressor": {"id": "gzip", "level": 1},
            "dtype": "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str,
            "shape": list(value.shape),
        }
        kvstore = {"driver": "file", "path": f"{checkpoint / path}/"}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata}
        ts.open(spec, create=True).result().write(value).result()
        node[key] = {**spec, "kvstore": {"driver": "gfile", "path": path}}
    contents = {"version": 3, "optimizer": {"state": {"step": 3}, "target": target}}
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    return checkpoint


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_0_tiny_legacy", "t5_1_1_tiny_orbax"])
def test_weights_are_bitwise_t5x_own(name):
    manifest = json.loads((FIXTURES / name / "params_manifest.json").read_text())
    arrays = t5x.load_t5x(FIXTURES / name / "checkpoint_3")
    assert set(arrays) == set(manifest)
    for path, expected in manifest.items():
        value = arrays[path].read_all()
        assert value.shape == arrays[path].shape == tuple(expected["shape"])
        assert value.dtype.name == arrays[path].dtype == "float32"
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        assert digest == expected["sha256_f32"], path


@pytest.mark.parametrize("name", ["t5_1_1_tiny_legacy", "t5_1_1_tiny_orbax"])
def test_a_part_across_chunks_equals_the_part_of_the_whole(name):
    array = t5x.load_t5x(FIXTURES / name)["token_embedder/embedding"]
    assert array.shape == (256, 32)
    part = array.read((slice(50, 150), slice(8, 16)))
    np.testing.assert_array_equal(part, array.read_all()[50:150, 8:16])


def test_loading_works_where_an_event_loop_runs():
    """As in a notebook."""

    async def cell():
        return t5x.load_t5x(FIXTURES / "t5_1_1_tiny_orbax")

    assert len(asyncio.run(cell())) == 52


def test_weights_are_not_read_before_they_are_asked_for(legacy):
    arrays = t5x.load_t5x(legacy)
    (legacy / QUERY_FOLDER / "0.0").write_bytes(b"")
    with pytest.raises(InputError, match=r"query\.kernel: parameter encoder/layers_0/attention"):
        arrays[QUERY].read_all()


@pytest.mark.parametrize("driver", ["file", "gfile", "gcs"])
@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("old", [False, True])
def test_every_look_of_a_spec(legacy, driver, slash, old):
    expected = t5x.load_t5x(legacy)[QUERY].read_all()

    def change(contents):
        node, key = leaf_of(contents, QUERY)
        spec = node[key]
        spec["kvstore"] = {"driver": driver}
        if driver == "gcs":
            spec["kvstore"]["bucket"] = "t5x-dummy-bucket"
        # Before tensorstore 0.1.14 the path stood at the top level, and the dtype in `metadata`.
        (spec if old else spec["kvstore"])["path"] = QUERY_FOLDER + slash
        if old:
            del spec["dtype"]
            spec["metadata"]["dtype"] = "<f4"

    edit_msgpack(legacy, change)
    np.testing.assert_array_equal(t5x.load_t5x(legacy)[QUERY].read_all(), expected)


def test_every_leaf_may_be_inline(legacy):
    expected = {name: array.read_all() for name, array in t5x.load_t5x(legacy).items()}

    def change(contents):
        for name, value in expected.items():
            node, key = leaf_of(contents, name)
            node[key] = np.array(value)

    edit_msgpack(legacy, change)
    for folder in legacy.glob("target.*"):
        shutil.rmtree(folder)
    inline = t5x.load_t5x(legacy)
    assert list(inline) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(inline[name].read_all(), value)
        np.testing.assert_array_equal(
            inline[name].read((slice(0, 2),) * value.ndim), value[(slice(0, 2),) * value.ndim]
        )


def test_bfloat16_and_chunks_that_do_not_divide_the_shape(tmp_path):
    kernel = np.arange(70, dtype=np.float32).reshape(10, 7).astype(ml_dtypes.bfloat16)
    scale = np.arange(7, dtype=np.float32).astype(ml_dtypes.bfloat16)
    arrays = t5x.load_t5x(
        write_checkpoint(tmp_path / "checkpoint_1", {"a/kernel": kernel, "b/scale": scale}, (4, 3))
    )
    assert (arrays["a/kernel"].dtype, arrays["b/scale"].dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_array_equal(arrays["a/kernel"].read_all(), kernel)
    np.testing.assert_array_equal(arrays["b/scale"].read_all(), scale)
    (tmp_path / "checkpoint_1/target.a.kernel/2.2").unlink()
    with pytest.raises(InputError, match=r"target\.a\.kernel/2\.2: a chunk of parameter a/kernel"):
        t5x.load_t5x(tmp_path)


def test_a_prompt_is_returned_with_the_rest(tmp_path):
    prompt = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint_9", {"encoder/prompt/prompt/prompt": prompt, "b/scale": prompt[0]}
    )
    arrays = t5x.load_t5x(checkpoint)
    np.testing.assert_array_equal(arrays["encoder/prompt/prompt/prompt"].read_all(), prompt)


def test_the_optimizer_state_is_not_touched(legacy):
    for folder in legacy.glob("state.*"):
        shutil.rmtree(folder)
    assert len(t5x.load_t5x(legacy)) == 52


# What a path means


def test_the_newest_checkpoint_is_the_largest_number(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path / f"checkpoint_{step}", {"b/scale": np.full(3, step, np.float32)})
    (tmp_path / "checkpoint_200.tmp-1650000000").mkdir()
    (tmp_path / "checkpoint_300").mkdir()
    assert t5x.find_checkpoint(tmp_path).name == "checkpoint_100"
    assert t5x.load_t5x(tmp_path)["b/scale"].read_all()[0] == 100
    assert t5x.find_checkpoint(tmp_path / "checkpoint_9").name == "checkpoint_9"
    assert t5x.find_checkpoint(tmp_path / "checkpoint_9" / "checkpoint").name == "checkpoint_9"


def test_a_newest_orbax_checkpoint_that_is_not_finished_is_passed_over(tmp_path):
    for step in (3, 4):
        shutil.copytree(
            FIXTURES / "t5_1_1_tiny_orbax/checkpoint_3", tmp_path / f"checkpoint_{step}"
        )
    assert t5x.find_checkpoint(tmp_path).name == "checkpoint_4"
    (tmp_path / "checkpoint_4/state/manifest.ocdbt").unlink()
    assert t5x.find_checkpoint(tmp_path).name == "checkpoint_3"
    with pytest.raises(InputError, match=r"checkpoint_4/state: manifest\.ocdbt is missing"):
        t5x.load_t5x(tmp_path / "checkpoint_4")


def test_is_t5x(tmp_path, legacy):
    assert t5x.is_t5x(legacy)
    assert t5x.is_t5x(legacy.parent)
    assert t5x.is_t5x(FIXTURES / "t5_1_1_tiny_orbax")
    state = FIXTURES / "t5_1_1_tiny_orbax" / "checkpoint_3" / "state"
    assert t5x.is_t5x(state) and t5x.find_checkpoint(state) == state.parent
    for name in ("default", "weights"):  # an item of another name is meant by itself
        item = tmp_path / name / "checkpoint_3" / name
        shutil.copytree(state, item)
        assert t5x.is_t5x(item) and t5x.find_checkpoint(item) == item
    assert not t5x.is_t5x(tmp_path / "nothing here")
    (tmp_path / "other" / "checkpoint_5").mkdir(parents=True)
    assert not t5x.is_t5x(tmp_path / "other")
    assert not t5x.is_t5x(FIXTURES / "prompt_oracle")
    assert not t5x.is_t5x(FIXTURES / "prompt_oracle" / "oracle.npz")
    with pytest.raises(InputError, match="no T5X checkpoint here"):
        t5x.find_checkpoint(FIXTURES / "prompt_oracle")


# Broken legacy files


def test_a_missing_chunk_is_an_error_and_not_zeros(legacy):
    (legacy / "target.token_embedder.embedding/2.0").unlink()
    with pytest.raises(InputError, match=r"embedding/2\.0: a chunk of .* token_embedder/embedding"):
        t5x.load_t5x(legacy)


def test_a_missing_dotfile_or_folder_is_named(legacy):
    (legacy / QUERY_FOLDER / ".zarray").unlink()
    with pytest.raises(
        InputError, match=rf"{QUERY_FOLDER}/\.zarray: the file of parameter {QUERY}"
    ):
        t5x.load_t5x(legacy)
    shutil.rmtree(legacy / QUERY_FOLDER)
    with pytest.raises(
        InputError, match=rf"{QUERY_FOLDER}/\.zarray: the file of parameter {QUERY}"
    ):
        t5x.load_t5x(legacy)


def test_a_truncated_chunk_is_named_when_read(legacy):
    chunk = legacy / QUERY_FOLDER / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"{QUERY_FOLDER}: parameter {QUERY} .*truncated"):
        t5x.load_t5x(legacy)[QUERY].read_all()


def test_a_damaged_zarray_is_named(legacy):
    (legacy / QUERY_FOLDER / ".zarray").write_text('{"zarr_format": 2, "shape": [4')
    with pytest.raises(
        InputError,
        match=rf"parameter {QUERY} cannot be opened \(.*Error parsing object member 'shape'.*\)$|"
        rf"parameter {QUERY} cannot be opened \(.*JSON.*\)$",
    ):
        t5x.load_t5x(legacy)


def test_a_shape_that_is_not_the_spec_s(legacy):
    shutil.rmtree(legacy / QUERY_FOLDER)
    shutil.copytree(legacy / "target.decoder.layers_0.mlp.wo.kernel", legacy / QUERY_FOLDER)
    with pytest.raises(InputError, match=rf"parameter {QUERY} has shape \[64, 32\]"):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_msgpack_is_named(legacy, keep):
    file = legacy / "checkpoint"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"checkpoint_3/checkpoint: the file is truncated"):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize(
    "path",
    [f"../checkpoint_3/{QUERY_FOLDER}/", f"/etc/{QUERY_FOLDER}", f"gs://bucket/{QUERY_FOLDER}"],
)
def test_a_path_that_leaves_the_checkpoint_is_refused(legacy, path):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        node[key]["kvstore"]["path"] = path

    edit_msgpack(legacy, change)
    with pytest.raises(
        InputError, match=rf"path of parameter {QUERY}.* points outside of the checkpoint"
    ):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize("path", [None, "", "/", 3])
def test_a_spec_without_a_path_is_named(legacy, path):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        node[key]["kvstore"]["path"] = path

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=rf"checkpoint: the spec of parameter {QUERY} has no path"):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize(
    ("field", "value"), [("driver", "n5"), ("kvstore", {"driver": "http", "path": "x"})]
)
def test_another_driver_is_refused(legacy, field, value):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        node[key][field] = value

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=rf"parameter {QUERY} is stored by"):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize("field", ["driver", "kvstore", "dtype", "metadata"])
@pytest.mark.parametrize("nest", [lambda x: x, lambda x: {"path": x, "shape": [x]}])
def test_an_array_inside_of_a_spec_is_named(legacy, field, nest):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        node[key][field] = nest(np.zeros(3))

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=rf"the spec of parameter {QUERY} is damaged"):
        t5x.load_t5x(legacy)


@pytest.mark.parametrize("value", [None, "text", 3])
def test_a_leaf_that_is_no_array_is_named(legacy, value):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        node[key] = value

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=rf"parameter {QUERY} is a (NoneType|str|int)"):
        t5x.load_t5x(legacy)


def test_a_lone_spec_in_place_of_the_weights_is_refused(legacy):
    def change(contents):
        node, key = leaf_of(contents, QUERY)
        contents["optimizer"] = {"target": node[key]}

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match="the checkpoint has no weights"):
        t5x.load_t5x(legacy)


def test_uint16_is_refused_in_the_msgpack_and_in_zarr(tmp_path):
    numbers = np.zeros((4, 4), np.uint16)
    write_checkpoint(tmp_path / "checkpoint_1", {"b/scale": numbers[0]})
    write_checkpoint(tmp_path / "checkpoint_2", {"a/kernel": numbers})
    for checkpoint in ("checkpoint_1", "checkpoint_2"):
        with pytest.raises(InputError, match="is uint16, T5X's bfloat16 of checkpoint version 2"):
            t5x.load_t5x(tmp_path / checkpoint)
    write_checkpoint(tmp_path / "checkpoint_3", {"b/scale": np.zeros(4, np.int32)})
    with pytest.raises(InputError, match="b/scale is int32, not one of float32, bfloat16"):
        t5x.load_t5x(tmp_path / "checkpoint_3")


@pytest.mark.parametrize("name", ["decoder/logits_dense/kernel", "encoder/layers_1/mlp/wo/kernel"])
def test_a_parameter_that_the_optimizer_knows_is_missed(legacy, name):
    def change(contents):
        node, key = leaf_of(contents, name)
        del node[key]

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=f"checkpoint: parameter {name} is missing"):
        t5x.load_t5x(legacy)

    def change_more(contents):
        node, key = leaf_of(contents, "token_embedder/embedding")
        del node[key]

    edit_msgpack(legacy, change_more)  # of several the first in the alphabet is named
    with pytest.raises(InputError, match=f"checkpoint: parameter {name} is missing"):
        t5x.load_t5x(legacy)


def test_a_parameter_that_the_optimizer_in_orbax_knows_is_missed(tmp_path):
    ocp.PyTreeCheckpointer().save(
        tmp_path / "checkpoint_1" / "state",
        {
            "target": {"encoder": {"encoder_norm": {"scale": np.ones(3, np.float32)}}},
            "state": {"param_states": {"decoder": {"logits_dense": {"kernel": {"v": np.ones(1)}}}}},
        },
    )
    with pytest.raises(InputError, match="parameter decoder/logits_dense/kernel is missing"):
        t5x.load_t5x(tmp_path)


def test_other_versions_are_refused(legacy):
    for version in (2, np.array([3, 3])):
        edit_msgpack(legacy, lambda contents, version=version: contents.update(version=version))
        with pytest.raises(InputError, match=r"T5X checkpoint version .*; ptjax reads version 3"):
            t5x.load_t5x(legacy)
    edit_msgpack(legacy, lambda contents: contents.pop("version"))
    with pytest.raises(InputError, match="lacks `version` or `optimizer`"):
        t5x.load_t5x(legacy)
    edit_msgpack(legacy, lambda contents: contents.update(version=3, optimizer={"target": {}}))
    with pytest.raises(InputError, match="holds no model"):
        t5x.load_t5x(legacy)


def test_tensorflow_and_an_orbax_without_its_arrays_are_refused_by_name(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000000"\n')
    with pytest.raises(InputError, match="Mesh TensorFlow"):
        t5x.load_t5x(tmp_path)
    contents = {"_optimizer": {"target": {"kernel": "PLACEHOLDER://_optimizer.target.kernel"}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    with pytest.raises(InputError, match="parameter kernel is missing, but the checkpoint's own"):
        t5x.load_t5x(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "encoder/encoder/attention/query/kernel",
        "decoder/decoder/scan/mlp/wo/kernel",
        "encoder/layers/mlp/wo/kernel",
    ],
)
def test_a_scanned_tree_is_refused_by_name(tmp_path, name):
    write_checkpoint(tmp_path / "checkpoint_1", {name: np.zeros((4, 2, 4), np.float32)})
    with pytest.raises(InputError, match=rf"{name} \[4, 2, 4\] belongs to a scanned model"):
        t5x.load_t5x(tmp_path)


# Broken Orbax files


@pytest.mark.parametrize("what", ["ocdbt.process_0", "ocdbt.process_0/d", "d"])
def test_a_missing_part_of_the_database(orbax, what):
    shutil.rmtree(orbax / "state" / what)
    with pytest.raises(InputError, match=r"state.*(the file is missing|damaged)"):
        t5x.load_t5x(orbax)


def test_each_data_file_that_the_index_names_must_be_whole(orbax):
    """Optimizer state counts too: a copy without it is incomplete all the same."""
    named = []
    for file in sorted((orbax / "state/ocdbt.process_0/d").iterdir()):
        data = file.read_bytes()
        for damaged, message in ((None, "the file is missing"), (data[:1000], "is truncated")):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            try:
                t5x.load_t5x(orbax)
            except InputError as error:
                assert f"{file.name}: the file" in str(error)
                assert message in str(error)
                named.append(file.name)
            file.write_bytes(data)
    # The rest are index nodes of the one process, which the merged index has replaced.
    assert len(named) == 8 and len(set(named)) == 4
    assert len(t5x.load_t5x(orbax)) == 52


def test_a_chunk_that_the_database_lacks(tmp_path):
    """Simulates a save that was cut off between two chunks."""
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/checkpoint_1/state/"}
    value = np.ones((8, 4), np.float32)
    spec = {"driver": "zarr", "kvstore": {**base, "path": "target.a.kernel/"}}
    spec["metadata"] = {"chunks": [4, 4], "dtype": "<f4", "shape": [8, 4]}
    ts.open(spec, create=True).result().write(value).result()
    np.testing.assert_array_equal(t5x.load_t5x(tmp_path)["a/kernel"].read_all(), value)
    ts.KvStore.open(base).result().write("target.a.kernel/1.0", None).result()
    with pytest.raises(InputError, match=r"\(target\.a\.kernel\)/1\.0: a chunk of parameter a/"):
        t5x.load_t5x(tmp_path)


def test_damaged_bytes_inside_the_database_are_named_when_read(orbax):
    largest = max((orbax / "state/ocdbt.process_0/d").iterdir(), key=lambda f: f.stat().st_size)
    largest.write_bytes(b"\0" * largest.stat().st_size)
    arrays = t5x.load_t5x(orbax)
    with pytest.raises(InputError, match=rf"state \({QUERY_FOLDER}\): parameter {QUERY}"):
        arrays[QUERY].read_all()
