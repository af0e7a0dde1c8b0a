"""Trees under T5X's names that Orbax wrote: 0.4 to 0.11 from fixtures, the installed one here."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from flax import serialization
from orbax import checkpoint as ocp
from orbax.checkpoint import v1
from train_states import state_of

from ptjax.backbones.describe import describe
from ptjax.backbones.open import open_backbone
from ptjax.errors import InputError
from ptjax.interop import t5x
from ptjax.trainer.checkpoints import Checkpoints
from ptjax.trees import unflatten_paths

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
ORBAX = FIXTURES / "orbax"
SHAPES = {
    "token_embedder/embedding": (6, 4),
    "encoder/encoder_norm/scale": (4,),
    "encoder/layers_0/attention/query/kernel": (4, 6),
    "decoder/decoder_norm/scale": (4,),
}


def expected():
    """What `fixtures/orbax/write.py` saved: -3, -2, ..., and a scale of zeros."""
    arrays = {n: (np.arange(np.prod(s)) - 3).reshape(s) for n, s in SHAPES.items()}
    arrays["decoder/decoder_norm/scale"] = np.zeros(4)
    kinds = {name: "bfloat16" if "query" in name else "float32" for name in arrays}
    return {name: arrays[name].astype(jnp.dtype(kinds[name])) for name in arrays}


def tree():
    return unflatten_paths({name: jnp.asarray(value) for name, value in expected().items()})


def check(path):
    """`path` is read, whole, and to the bit."""
    assert t5x.is_t5x(path)
    arrays = t5x.load_t5x(path)
    wanted = expected()
    assert set(arrays) == set(wanted)
    for name, value in wanted.items():
        assert (arrays[name].shape, arrays[name].dtype) == (value.shape, value.dtype.name)
        np.testing.assert_array_equal(arrays[name].read_all(), value)


def save(path, tree, **options):
    """One item of the installed Orbax."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(epath.Path(path), tree)


@pytest.mark.parametrize(
    "name",
    [
        "v0_4_ocdbt",
        "v0_4_folders",
        "v0_4_msgpack",
        "v0_5_manager",
        "v0_5_manager/8/default",
        "v0_7_zarr3",
        "v0_11_items",
        "v0_11_items/3/params",
    ],
)
def test_case_1_16_what_older_versions_of_orbax_wrote(name):
    check(ORBAX / name)


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: tree,
        lambda tree: {"target": tree, "state": {"step": np.ones(1)}},
        lambda tree: {"step": 3, "params": tree, "opt_state": [{"mu": tree}], "none": None},
    ],
    ids=["bare", "target", "params"],
)
def test_case_1_16_one_item_of_the_installed_orbax(tmp_path, ocdbt, zarr3, wrap):
    save(tmp_path / "x", wrap(tree()), use_ocdbt=ocdbt, use_zarr3=zarr3)
    check(tmp_path / "x")


def test_case_1_16_a_manager_s_newest_complete_step(tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10, 11):
            manager.save(step, args=ocp.args.StandardSave({"params": tree()}))
            manager.wait_until_finished()
    (tmp_path / "run" / "12.orbax-checkpoint-tmp-3").mkdir()
    (tmp_path / "run" / "11" / "default" / "manifest.ocdbt").unlink()
    assert t5x.find_checkpoint(tmp_path / "run").name == "10"
    check(tmp_path / "run")
    check(tmp_path / "run" / "9")
    with pytest.raises(InputError, match=r"11/default: manifest\.ocdbt is missing, which Orbax"):
        t5x.load_t5x(tmp_path / "run" / "11")
    # Where a folder cannot be renamed, the marker tells.
    for step, marked in ((9, True), (10, False)):
        marker = tmp_path / "run" / str(step) / "commit_success.txt"
        marker.write_text("") if marked else marker.unlink(missing_ok=True)
    (tmp_path / "run" / "11" / "commit_success.txt").unlink(missing_ok=True)
    assert t5x.find_checkpoint(tmp_path / "run").name == "9"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: tree,
        lambda tree: {"params": tree, "opt_state": [np.ones(3), {"mu": tree}], "step": 3},
    ],
    ids=["bare", "params"],
)
def test_case_1_16_orbax_v1_writes_zarr_3(tmp_path, wrap):
    v1.save(tmp_path / "x", wrap(tree()))
    check(tmp_path / "x")
    check(tmp_path / "x" / "state")


def test_case_1_16_orbax_v1_steps_and_items(tmp_path):
    with v1.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save_checkpointables(step, {"params": tree(), "step": {"n": np.ones(1)}})
    assert t5x.find_checkpoint(tmp_path / "run").name == "2"
    check(tmp_path / "run")
    check(tmp_path / "run" / "1" / "params")


def test_case_1_16_a_whole_t5_that_orbax_v1_saved(tmp_path):
    """Its sizes and fingerprint are those of the same weights in T5X's format."""
    theirs = FIXTURES / "t5_1_1_tiny_orbax"
    arrays = {name: jnp.asarray(x.read_all()) for name, x in t5x.load_t5x(theirs).items()}
    v1.save(tmp_path / "x", {"params": unflatten_paths(arrays)})
    assert open_backbone(tmp_path / "x").config == open_backbone(theirs).config
    ours = describe(tmp_path / "x")
    assert ours["fingerprint"] == describe(theirs)["fingerprint"]


# Chunks that are not there


def database(folder):
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()


def test_case_1_16_a_missing_chunk_is_legal_only_where_zeros_are_left_out(tmp_path):
    """0.7 leaves them out of a database; v1 writes them, and says so in `_METADATA`."""
    name = "params.decoder.decoder_norm.scale"
    assert f"{name}/c/0".encode() not in database(ORBAX / "v0_7_zarr3").list().result()
    check(ORBAX / "v0_7_zarr3")
    v1.save(tmp_path / "x", {"params": tree()})
    store = database(tmp_path / "x" / "state")
    assert f"{name}/c/0".encode() in store.list().result()
    store.write(f"{name}/c/0", None).result()
    with pytest.raises(InputError, match=rf"{name}\)/c/0: a chunk of parameter decoder/decoder_n"):
        t5x.load_t5x(tmp_path / "x")


def test_case_1_16_in_folders_a_missing_chunk_is_a_lost_one(tmp_path):
    """0.7 leaves zeros out here as well, where a file that was lost would look the same."""
    with pytest.raises(InputError, match=r"scale/c/0: a chunk .* is missing; .*if it was all zero"):
        t5x.load_t5x(ORBAX / "v0_7_zarr3_folders")
    kernel = jnp.arange(32.0).reshape(8, 4)
    args = ocp.args.PyTreeSave(
        {"target": {"a": {"kernel": kernel}}},
        save_args={"target": {"a": {"kernel": ocp.SaveArgs(chunk_byte_size=64)}}},
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "x", args=args)
    np.testing.assert_array_equal(t5x.load_t5x(tmp_path / "x")["a/kernel"].read_all(), kernel)
    chunks = sorted((tmp_path / "x" / "target.a.kernel" / "c").rglob("*"))
    files = [path for path in chunks if path.is_file()]
    files[-1].unlink()
    with pytest.raises(InputError, match=r"target\.a\.kernel/c/\d/\d: a chunk of parameter a/ker"):
        t5x.load_t5x(tmp_path / "x")


def test_case_1_16_the_data_files_of_orbax_v1_must_be_whole(tmp_path):
    kernel = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    v1.save(tmp_path / "x", {"params": tree(), "opt_state": {"mu": kernel}})
    named = 0
    for file in (tmp_path / "x" / "state").rglob("d/*"):
        data = file.read_bytes()
        for damaged, message in ((None, "the file is missing"), (data[:1000], "is truncated")):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            try:
                t5x.load_t5x(tmp_path / "x")
            except InputError as error:
                named += f"{file.name}: the file" in str(error) and message in str(error)
            file.write_bytes(data)
    assert named >= 2
    check(tmp_path / "x")


def test_case_1_16_a_parameter_that_the_list_has_is_missed(tmp_path):
    save(tmp_path / "x", {"params": tree()}, use_ocdbt=False)
    shutil.rmtree(tmp_path / "x" / "params.decoder.decoder_norm.scale")
    with pytest.raises(
        InputError, match="parameter decoder/decoder_norm/scale is missing, but the che"
    ):
        t5x.load_t5x(tmp_path / "x")


def test_case_1_16_the_orbax_of_2022_in_t5x(tmp_path):
    """A msgpack of placeholders beside the folders, and no list of leaves."""
    state = tmp_path / "checkpoint_7" / "state"
    shutil.copytree(ORBAX / "v0_4_folders", state)
    for name in ("_METADATA", "_sharding"):
        (state / name).unlink()
    check(tmp_path)
    contents = serialization.msgpack_restore((state / "checkpoint").read_bytes())
    contents["target"]["decoder"]["logits_dense"] = {"kernel": "PLACEHOLDER://target.decoder.x"}
    (state / "checkpoint").write_bytes(serialization.msgpack_serialize(contents))
    with pytest.raises(InputError, match="parameter decoder/logits_dense/kernel is missing"):
        t5x.load_t5x(tmp_path)


# Named for what they are


def test_case_1_16_a_scanned_tree_stays_refused(tmp_path):
    scanned = {"encoder": {"encoder": {"mlp": {"wo": {"kernel": np.ones((4, 2, 4), np.float32)}}}}}
    v1.save(tmp_path / "x", {"params": {**tree(), "encoder": scanned["encoder"]}})
    with pytest.raises(InputError, match=r"encoder/mlp/wo/kernel .* belongs to a scanned model"):
        t5x.load_t5x(tmp_path / "x")


def test_case_1_16_another_model_is_named_by_what_it_holds(tmp_path):
    v1.save(tmp_path / "x", {"params": {"layer_0": {"w": np.ones(3)}, "embedder": np.ones(3)}})
    with pytest.raises(InputError) as error:
        open_backbone(tmp_path / "x")
    assert "this Orbax checkpoint does not hold a T5 under T5X's names" in str(error.value)
    assert "it holds params.embedder, params.layer_0 (in state)" in str(error.value)


def test_case_1_16_two_models_in_one_checkpoint(tmp_path):
    v1.save_checkpointables(tmp_path / "x", {"model": tree(), "average": tree()})
    with pytest.raises(
        InputError, match=r"several models .*/average .*, .*/model .*; name the fold"
    ):
        t5x.load_t5x(tmp_path / "x")
    check(tmp_path / "x" / "average")
    v1.save(tmp_path / "y", {"params": tree(), "model": {"params": tree()}})
    with pytest.raises(InputError, match=r"several models .*\(model\.params\), .*\(params\)"):
        t5x.load_t5x(tmp_path / "y")


def test_case_1_16_runs_side_by_side_are_no_steps(tmp_path):
    for name in ("a_1", "b_2"):
        shutil.copytree(ORBAX / "v0_4_ocdbt", tmp_path / name)
    with pytest.raises(InputError, match="a_1 and b_2 are of different runs; name one of them"):
        t5x.load_t5x(tmp_path)


def test_case_1_16_a_checkpoint_of_a_run_of_ptjax_is_named(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints")
    checkpoints.save(4, state_of(8), {"step": 4}, {"task": "a"})
    checkpoints.close()
    for path in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "4"):
        with pytest.raises(InputError, match=r"4: the checkpoint holds no model; .* run of ptjax"):
            open_backbone(path)
    assert describe(tmp_path / "checkpoints" / "4")["kind"] == "checkpoint"


def test_case_1_16_damage_in_what_an_item_says_of_itself(tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(ORBAX / "v0_4_folders", folder)
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": [1]}))
    with pytest.raises(InputError, match=r"_METADATA: the file is damaged \(no list of leaves\)"):
        t5x.load_t5x(folder)
    (folder / "_METADATA").write_text('{"tree_metadata": {')
    with pytest.raises(
        InputError, match=r"_METADATA: the file is truncated or not a JSON object \(Expecting"
    ):
        t5x.load_t5x(folder)
