"""`load_backbone`: every format, what is said, what is refused, how often a weight is read."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import shutil
import sys
import weakref
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from conftest import FIXTURES, load_expected
from etils import epath
from flax import serialization
from jax.sharding import Mesh
from t5_ids import with_lengths
from tiny import save_tiny, tiny_config

import ptjax
from ptjax.backbones import describe, shipped
from ptjax.backbones import load as backbones
from ptjax.backbones.fingerprint import fingerprint
from ptjax.backbones.load import load_backbone
from ptjax.backbones.open import would_download
from ptjax.backbones.save import save_backbone
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.interop import huggingface, t5x
from ptjax.interop.lazy_array import LazyArray, one_by_one
from ptjax.models.config import T5Config
from ptjax.models.stacking import UnstackedView
from ptjax.models.t5_family import T5_FAMILY
from ptjax.sharding.meshes import make_mesh
from ptjax.sharding.rules import shardings_of
from ptjax.trees import flatten_paths, unflatten_paths

LEGACY = FIXTURES / "t5_1_1_tiny_legacy"
ORBAX = FIXTURES / "t5_1_1_tiny_orbax"
OLD = FIXTURES / "t5_1_0_tiny_legacy"
WO = "encoder/layers_1/mlp/wo/kernel"
WI = "encoder/layers_0/mlp/wi_0/kernel"
QUERY = "encoder/layers_0/attention/query/kernel"
EMBEDDING = "token_embedder/embedding"
PROMPT = "encoder/prompt/prompt/prompt"
COUNTER = "/tensorstore/kvstore/file/bytes_read"


@pytest.fixture
def legacy(tmp_path):
    """A copy of T5X's legacy checkpoint that a test may break; its folder is `tmp_path/t5`."""
    return shutil.copytree(LEGACY / "checkpoint_3", tmp_path / "t5" / "checkpoint_3")


@pytest.fixture
def saved(tmp_path, t5_1_1):
    """The same weights as a Hugging Face directory, float32."""
    save_backbone(tmp_path / "hf", t5_1_1.config, t5_1_1.variables["params"], dtype="float32")
    return tmp_path / "hf"


def weights(backbone) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten_paths(backbone.variables["params"]).items()}


def assert_same_weights(one, other) -> None:
    one, other = weights(one), weights(other)
    assert set(one) == set(other)
    for path, value in one.items():
        assert value.dtype == other[path].dtype
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def edit_msgpack(checkpoint: pathlib.Path, change) -> None:
    file = checkpoint / "checkpoint"
    contents = serialization.msgpack_restore(file.read_bytes())
    change(contents["optimizer"]["target"])
    file.write_bytes(serialization.msgpack_serialize(contents))


def edit_json(file: pathlib.Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def add_zarr(checkpoint: pathlib.Path, name: str, value: np.ndarray) -> None:
    """One more parameter, as T5X lays it out."""
    folder = f"target.{name.replace('/', '.')}"
    spec: dict[str, Any] = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{checkpoint / folder}/"},
        "metadata": {
            "chunks": list(value.shape),
            "compressor": {"id": "gzip", "level": 1},
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        },
    }
    ts.open(spec, create=True).result().write(value).result()
    leaf = {**spec, "dtype": value.dtype.name, "kvstore": {"driver": "gfile", "path": folder}}

    def change(target):
        *parents, last = name.split("/")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = leaf

    edit_msgpack(checkpoint, change)


# What a path holds


def test_every_format_holds_the_same_backbone(tmp_path, t5_1_1):
    params = t5_1_1.variables["params"]
    save_backbone(tmp_path / "one", t5_1_1.config, params, dtype="float32")
    save_backbone(tmp_path / "many", t5_1_1.config, params, dtype="float32", max_shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    for path in (LEGACY, LEGACY / "checkpoint_3", ORBAX, tmp_path / "one", str(tmp_path / "many")):
        loaded = load_backbone(path)
        assert_same_weights(loaded, t5_1_1)
        assert loaded.config == t5_1_1.config
        assert loaded.fingerprint == t5_1_1.fingerprint


def test_t5_1_0_is_known_by_its_tree(t5_1_0):
    assert t5_1_0.config.logits_via_embedding
    assert t5_1_0.config.mlp_activations == ("relu",)
    assert "logits_dense" not in t5_1_0.variables["params"]["decoder"]


@pytest.mark.parametrize("path", [ORBAX, "saved"])
def test_logits_are_t5x_own_in_the_other_formats(path, request):
    loaded = load_backbone(request.getfixturevalue(path) if path == "saved" else path)
    want = load_expected("t5_1_1_tiny_orbax")["short"]
    logits = jax.jit(with_lengths(loaded.apply_fn))(
        loaded.variables, want["encoder_input_tokens"], want["decoder_input_tokens"]
    )
    real = want["decoder_target_tokens"] > 0
    np.testing.assert_allclose(logits[real], want["logits"][real], rtol=0, atol=1e-4)


def test_a_backbone_is_frozen_and_named(t5_1_1):
    assert t5_1_1.name == str(LEGACY / "checkpoint_3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        t5_1_1.fingerprint = "sha256:0"


def test_the_newest_of_several_checkpoints_is_loaded_and_said(legacy, caplog):
    folder = legacy.parent
    load_backbone(folder)
    assert not caplog.records
    newer = shutil.copytree(legacy, folder / "checkpoint_12")
    edit_msgpack(newer, lambda target: target["decoder"]["decoder_norm"]["scale"].clear())
    scale = np.full(32, 3, np.float32)
    add_zarr(newer, "decoder/other_norm/scale", scale)  # a folder of its own, beside the old one
    edit_msgpack(
        newer,
        lambda target: target["decoder"].update(decoder_norm=target["decoder"].pop("other_norm")),
    )
    with caplog.at_level(logging.INFO, logger="absl"):
        loaded = load_backbone(folder)
    np.testing.assert_array_equal(
        loaded.variables["params"]["decoder"]["decoder_norm"]["scale"], scale
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: loading the newest of its checkpoints, checkpoint_12"
    ]
    caplog.clear()
    assert load_backbone(legacy).name == str(legacy)
    assert not caplog.records


def test_a_hub_id_is_downloaded_and_its_revision_recorded(saved, monkeypatch):
    asked = []

    def download(repo_id, revision, ours):
        asked.append((repo_id, revision))
        return epath.Path(saved), "0123abc"

    monkeypatch.setattr(huggingface, "download", download)
    loaded = load_backbone("google/t5-tiny")
    assert loaded.name == "google/t5-tiny@0123abc"
    assert load_backbone(loaded.name).name == loaded.name
    assert asked == [("google/t5-tiny", None), ("google/t5-tiny", "0123abc")]


@pytest.mark.parametrize("path", ["/nowhere/t5", "./nowhere", "~/nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(huggingface, "download", None)
    with pytest.raises(InputError, match=f"{path}: the path does not exist"):
        load_backbone(path)


def test_only_a_hub_id_that_is_not_here_would_be_downloaded(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "is_downloaded", lambda repo_id, revision: revision == "0a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "t5").mkdir(parents=True)
    for name in ("ptjax-nano", saved, "runs/t5", "/nowhere/t5", "a/b/c", "google/t5@0a"):
        assert not would_download(name), name
    for name in ("google/t5", "google/t5@0b", "t5-small"):
        assert would_download(name), name


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="holds no backbone that ptjax knows"):
        load_backbone(tmp_path)


def test_the_shipped_backbone_has_a_name():
    folder = shipped.find("ptjax-nano")
    assert folder is not None
    assert (folder / "spiece.model").exists()
    assert shipped.find("google/t5-small") is None


def test_backbones_of_the_package_ptjax_models(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ptjax_models", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"ptjax-pico is not a path.*pip install \./models"):
        load_backbone("ptjax-pico")
    monkeypatch.delitem(sys.modules, "ptjax_models")
    for stage in ("pico-span", "pico-lm"):
        save_tiny(tmp_path / "ptjax_models" / stage, tiny_config(), seed=len(stage))
    (tmp_path / "ptjax_models" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    first, last = load_backbone("ptjax-pico-span"), load_backbone("ptjax-pico-lm")
    assert first.fingerprint != last.fingerprint == load_backbone("ptjax-pico").fingerprint
    assert not would_download("ptjax-pico")
    with pytest.raises(InputError, match=r"ptjax-piko .*; did you mean ptjax-pico-lm\?"):
        load_backbone("ptjax-piko")
    with pytest.raises(InputError, match="there are ptjax-nano, ptjax-pico-lm, ptjax-pico-span"):
        load_backbone("ptjax-xxl-of-another-kind")


# Config


def test_what_t5x_does_not_tell_is_assumed_and_can_be_overridden(t5_1_1):
    ids = {"pad_id", "eos_ids", "decoder_start_id", "forced_bos_id"}
    sizes = {"dropout_rate", "layer_norm_epsilon", "mlp_activations", "relpos_max_distance"}
    assert t5_1_1.assumed == tuple(sorted(ids | sizes))
    loaded = load_backbone(
        LEGACY, dropout_rate=0, relpos_max_distance=64, mlp_activations=("silu", "linear")
    )
    assert set(loaded.assumed) == ids | {"layer_norm_epsilon"}
    assert (loaded.config.dropout_rate, loaded.config.relpos_max_distance) == (0, 64)
    assert loaded.config.mlp_activations == ("silu", "linear")


def test_config_json_tells_all_and_the_user_stands_above_it(saved):
    edit_json(saved / "config.json", lambda config: config.update(dropout_rate=0.3))
    loaded = load_backbone(saved)
    assert (loaded.config.dropout_rate, loaded.assumed) == (0.3, ())
    assert load_backbone(saved, dropout_rate=0.2).config.dropout_rate == 0.2


@pytest.mark.parametrize("where", ["checkpoint_3", "."])
def test_a_config_json_beside_a_t5x_checkpoint_is_read(legacy, saved, where):
    folder = legacy.parent
    shutil.copy(saved / "config.json", folder / where)
    edit_json(folder / where / "config.json", lambda config: config.update(dropout_rate=0.3))
    loaded = load_backbone(folder)
    assert (loaded.config.dropout_rate, loaded.assumed) == (0.3, ())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"dropout": 0.2}, r"no field 'dropout'; did you mean dropout_rate\?"),
        ({"zzz": 1}, "no field 'zzz'"),
        ({"num_heads": "4"}, "num_heads must be of type int, got '4'"),
        ({"mlp_activations": "relu"}, "mlp_activations must be of type tuple, got 'relu'"),
        (
            {"relpos_buckets": 16},
            r"rel_embedding has shape \(4, 32\), but the config says \(4, 16\)",
        ),
        ({"num_decoder_layers": 3}, "parameter decoder/layers_2/.* is missing"),
        ({"num_decoder_layers": 1}, "decoder/layers_1/.* does not belong to a T5 of this config"),
        ({"logits_via_embedding": True}, "decoder/logits_dense/kernel does not belong"),
        ({"mlp_activations": ("gelu", "sine")}, "invalid config of a T5.*sine"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
    ],
)
def test_overrides_that_do_not_fit(override, message):
    with pytest.raises(InputError, match=message):
        load_backbone(LEGACY, **override)


def test_dtype_is_of_weights_and_activations(t5_1_1):
    assert load_backbone(LEGACY).config.dtype == "float32"
    half = load_backbone(LEGACY, dtype="bfloat16")
    assert half.config.dtype == "bfloat16"
    for path, value in weights(half).items():
        assert value.dtype == ml_dtypes.bfloat16, path
        np.testing.assert_array_equal(value, weights(t5_1_1)[path].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_the_mesh_decides_the_default_dtype(monkeypatch, platform, dtype):
    device = type("Device", (), {"platform": platform, "device_kind": platform})()
    mesh = Mesh(np.array([[device]]), ("data", "model"))
    placed = []

    def place(stored, where):
        placed.append(stored.dtype)
        raise InputError("far enough")

    monkeypatch.setattr(backbones, "place", place)
    with pytest.raises(InputError, match="far enough"):
        load_backbone(LEGACY, mesh=mesh)
    assert placed == [dtype]


# What is not whole


def test_a_missing_parameter_is_named(legacy):
    edit_msgpack(legacy, lambda target: target["encoder"]["layers_1"]["mlp"].pop("wo"))
    with pytest.raises(InputError, match=f"{legacy}/checkpoint: parameter {WO} is missing"):
        load_backbone(legacy)


@pytest.mark.parametrize("name", [EMBEDDING, "encoder/relpos_bias/rel_embedding"])
def test_a_missing_parameter_that_tells_the_sizes_is_named(legacy, name):
    stack, *_, leaf = name.split("/")

    def change(target):
        (target[stack] if stack == "token_embedder" else target[stack]["relpos_bias"]).pop(leaf)

    edit_msgpack(legacy, change)
    with pytest.raises(InputError, match=f"{legacy}/checkpoint: parameter {name} is missing"):
        load_backbone(legacy)


def test_a_gate_is_known_by_either_branch():
    stored = t5x.load_t5x(LEGACY)
    del stored[WI]
    assert T5_FAMILY.infer_config(stored, "x")["mlp_activations"] == ("gelu", "linear")


def test_a_missing_chunk_is_named(legacy):
    chunk = next(file for file in (legacy / "target.token_embedder.embedding").glob("[0-9]*"))
    chunk.unlink()
    with pytest.raises(InputError, match=rf"{chunk}: a chunk of parameter {EMBEDDING} is missing"):
        load_backbone(legacy)


def test_a_truncated_chunk_is_named(legacy):
    chunk = legacy / f"target.{WO.replace('/', '.')}" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:40])
    with pytest.raises(InputError, match=f"wo.kernel: parameter {WO} cannot be read"):
        load_backbone(legacy)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (WO, (64, 31), rf"wo.kernel: parameter {WO} has shape \(64, 31\), .* says \(64, 32\)"),
        (WO, (64,), rf"wo.kernel: parameter {WO} has shape \(64,\), .* says \(64, 32\)"),
        (EMBEDDING, (64,), rf"embedding: parameter {EMBEDDING} has shape \(64,\)"),
        # Sizes are what most parameters tell, so the one that differs is the one that is named.
        (EMBEDDING, (256, 31), rf"{EMBEDDING} has shape \(256, 31\), .* says \(256, 32\)"),
        (QUERY, (32, 28), rf"parameter {QUERY} has shape \(32, 28\), .* says \(32, 32\)"),
        (WI, (32, 63), rf"parameter {WI} has shape \(32, 63\), .* says \(32, 64\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(legacy, name, shape, message):
    shutil.rmtree(legacy / f"target.{name.replace('/', '.')}")
    add_zarr(legacy, name, np.ones(shape, np.float32))
    with pytest.raises(InputError, match=f"{legacy}/target.*{message}"):
        load_backbone(legacy)


def test_a_truncated_safetensors_file_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{file}: the file is truncated.*tensor "):
        load_backbone(saved)


def test_a_missing_config_key_is_named(saved):
    edit_json(saved / "config.json", lambda config: config.pop("d_kv"))
    with pytest.raises(InputError, match=f"{saved}/config.json: the key 'd_kv' is missing"):
        load_backbone(saved)


def test_a_config_that_is_not_of_these_weights(saved):
    edit_json(saved / "config.json", lambda config: config.update(d_ff=65))
    with pytest.raises(InputError, match=rf"{saved}/model.*has shape \(32, 64\), .*\(32, 65\)"):
        load_backbone(saved)


def test_a_scanned_tree_is_refused_by_name(legacy):
    add_zarr(legacy, "encoder/encoder/mlp/wo/kernel", np.ones((64, 2, 32), np.float32))
    with pytest.raises(InputError, match=r"encoder/encoder/mlp/wo/kernel.*scanned"):
        load_backbone(legacy)


def test_a_parameter_of_another_network_is_named(legacy):
    add_zarr(legacy, "encoder/adapter/kernel", np.ones((2, 2), np.float32))
    with pytest.raises(InputError, match="encoder/adapter/kernel does not belong to a T5"):
        load_backbone(legacy)


# A prompt inside


def test_a_prompt_inside_a_checkpoint_is_left_out_and_said(legacy, t5_1_1, caplog):
    prompt = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    add_zarr(legacy, PROMPT, prompt)
    with caplog.at_level(logging.INFO, logger="absl"):
        loaded = load_backbone(legacy)
    assert_same_weights(loaded, t5_1_1)
    assert loaded.fingerprint == t5_1_1.fingerprint
    assert [record.getMessage() for record in caplog.records] == [
        f"{legacy} also holds a prompt, which is ignored; load_prompt(path) returns it"
    ]
    np.testing.assert_array_equal(ptjax.load_prompt(legacy).prompt, prompt)


# Fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("path", [LEGACY, ORBAX, "float32", "bfloat16"])
def test_fingerprints_are_equal_however_the_weights_came(tmp_path, t5_1_1, dtype, devices, path):
    if isinstance(path, str):
        save_backbone(tmp_path, t5_1_1.config, t5_1_1.variables["params"], dtype=path)
        path = tmp_path
    mesh = make_mesh(2) if devices == 8 else None
    loaded = load_backbone(path, dtype=dtype, mesh=mesh)
    assert loaded.fingerprint == t5_1_1.fingerprint
    assert loaded.fingerprint_v1 == t5_1_1.fingerprint_v1
    assert t5_1_1.fingerprint.startswith("v2:")
    assert t5_1_1.fingerprint_v1.startswith("sha256:")


CHANGES = {
    WO: (0, 0),
    "decoder/layers_0/mlp/wo/kernel": (0, 31),
    "decoder/layers_1/pre_cross_attention_layer_norm/scale": (17,),
    "encoder/encoder_norm/scale": (31,),
    EMBEDDING: (194, 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_element_changes_the_fingerprint(t5_1_1, name):
    flat = weights(t5_1_1)
    flat[name] = flat[name].copy()
    flat[name][CHANGES[name]] *= 1.01  # more than a bfloat16 rounds away
    changed = unflatten_paths({path: jax.numpy.asarray(x) for path, x in flat.items()})
    own = fingerprint(t5_1_1.config, changed)
    assert own.v1 != t5_1_1.fingerprint_v1 and own.v2 != t5_1_1.fingerprint


def test_sizes_and_exchanged_layers_change_the_fingerprint(t5_1_1):
    params = t5_1_1.variables["params"]
    config = dataclasses.replace(t5_1_1.config, num_heads=2, head_dim=16)
    assert fingerprint(config, params).v2 != t5_1_1.fingerprint
    one, other = params["encoder"]["layers_0"], params["encoder"]["layers_1"]
    exchanged = params | {"encoder": params["encoder"] | {"layers_0": other, "layers_1": one}}
    assert fingerprint(t5_1_1.config, exchanged).v2 != t5_1_1.fingerprint
    config = dataclasses.replace(t5_1_1.config, dtype="bfloat16", dropout_rate=0.3)
    assert fingerprint(config, params) == t5_1_1.fingerprints


# How weights are read


@dataclasses.dataclass
class Reads:
    """Every read of a parameter: its name, the bounds of the part."""

    parts: list[tuple[str, tuple[tuple[int, int], ...]]] = dataclasses.field(default_factory=list)
    alive: list[tuple[str, weakref.ref[np.ndarray]]] = dataclasses.field(default_factory=list)
    most_alive: int = 0

    def spy(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        def wrap(name: str, array: LazyArray) -> LazyArray:
            def read(index):
                held = {other for other, ref in self.alive if ref() is not None}
                self.most_alive = max(self.most_alive, len(held - {name}) + 1)
                bounds = [part.indices(n)[:2] for part, n in zip(index, array.shape, strict=True)]
                self.parts.append((name, tuple(bounds)))
                value = np.array(array.read(index))
                self.alive.append((name, weakref.ref(value)))
                return value

            return dataclasses.replace(array, read_parts=one_by_one(read))

        return {name: wrap(name, array) for name, array in arrays.items()}


@pytest.fixture(params=["legacy", "orbax", "huggingface"])
def spied(request, monkeypatch):
    """(path, its reads) of each format."""
    reads, paths = Reads(), {"legacy": LEGACY, "orbax": ORBAX}
    # Before anybody listens: writing it reads one of the others.
    path = paths.get(request.param) or request.getfixturevalue("saved")
    for module, name in ((t5x, "load_t5x"), (huggingface, "load_huggingface")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=original: reads.spy(f(*given)))
    return path, reads


@pytest.mark.parametrize("scan_layers", [False, True])
def test_each_weight_is_read_once_and_never_held_twice(spied, scan_layers):
    """Also for the fingerprint, and of a stack layer by layer; the largest come first.

    bfloat16, so that what was read is not what is kept.
    """
    path, reads = spied
    loaded = load_backbone(path, dtype="bfloat16", scan_layers=scan_layers)
    found = UnstackedView(flatten_paths(loaded.variables["params"]))
    shapes = {path: found[path].shape for path in found}
    assert sorted(reads.parts) == sorted(
        (path, tuple((0, size) for size in shape)) for path, shape in shapes.items()
    )
    assert reads.most_alive == 1
    sizes = [math.prod(stop for _, stop in part) for _, part in reads.parts]
    assert scan_layers or sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "fsdp"), [("4x2", False), ("4x2", True)])
def test_a_mesh_reads_each_part_once_and_gives_the_same_weights(spied, t5_1_1, name, fsdp):
    path, reads = spied
    loaded = load_backbone(path, mesh=name, fsdp=fsdp, scan_layers=fsdp)
    assert loaded.mesh == make_mesh(2) and loaded.fsdp == fsdp
    if not fsdp:
        assert_same_weights(loaded, t5_1_1)
    assert loaded.fingerprint == t5_1_1.fingerprint
    where = shardings_of(loaded.variables, loaded.mesh, fsdp=fsdp)
    for name, array in flatten_paths(loaded.variables["params"]).items():
        assert array.sharding == flatten_paths(where["params"])[name]
        expected = {
            tuple(part.indices(size)[:2] for part, size in zip(index, array.shape, strict=True))
            for index in array.sharding.devices_indices_map(array.shape).values()
        }
        # Stacked, each layer's part is read for itself.
        stacked = "/layers/" in name
        expected = {bounds[1:] for bounds in expected} if stacked else expected
        for path in UnstackedView({name: array}):
            parts = [part for read, part in reads.parts if read == path]
            assert sorted(parts) == sorted(expected)
    assert sum(math.prod(b - a for a, b in part) for _, part in reads.parts) == 66_176
    # 36 kernels of the layers lie in two parts, or two times four; embedding, logits and the two
    # tables of position biases in two; 12 norm scales in one.
    assert len(reads.parts) == 36 * (8 if fsdp else 2) + 4 * 2 + 12


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_chunk_that_several_devices_share_is_read_once(scan_layers):
    """As tensorstore counts what it read from files; kernels are one chunk each.

    Of the legacy layout: how often tensorstore looks into the index of Orbax's differs from time to
    time, and the index is larger than this backbone.
    """

    def bytes_read(**settings):
        def counted():
            [metric] = ts.experimental_collect_matching_metrics(COUNTER)
            return metric["values"][0]["value"]

        load_backbone(LEGACY)  # else there may be no counter yet
        before = counted()
        load_backbone(LEGACY, scan_layers=scan_layers, **settings)
        return counted() - before

    assert bytes_read(mesh="2x4") == bytes_read() > 66_176  # parameters, of 4 bytes, compressed


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("1x8", "num_heads = 4 is not a multiple of 8, the model axis of the mesh 1x8; MESH may"),
        ("3x2", "a mesh of 3x2 is 6 devices, and there are 8"),
        ("8", "MESH must be 'auto', data x model such as '8x1', .* got '8'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_said_before_a_weight_is_read(spied, mesh, message):
    path, reads = spied
    with pytest.raises(InputError, match=message):
        load_backbone(path, mesh=mesh)
    assert not reads.parts


# Tokenizers


def write_nano_tokenizer(directory):
    folder = shipped.find("ptjax-nano")
    (directory / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())


@pytest.fixture
def wide(tmp_path):
    """A backbone with as many embeddings as ptjax-nano's vocabulary has ids."""
    config = T5Config(
        vocab_size=8192,
        emb_dim=4,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=2,
        mlp_dim=4,
    )
    params = {
        name: np.ones(leaf.shape, np.float32)
        for name, leaf in flatten_paths(T5_FAMILY.parameter_shapes(config)).items()
    }
    save_backbone(tmp_path / "wide", config, unflatten_paths(params))
    return tmp_path / "wide"


def test_no_tokenizer(t5_1_1):
    assert t5_1_1.tokenizer is None


def test_the_tokenizer_beside_the_weights(wide):
    write_nano_tokenizer(wide)
    found = load_backbone(wide).tokenizer
    assert found is not None
    assert found.vocab_size == 8192


def test_the_tokenizer_argument_stands_above_the_files(wide):
    write_nano_tokenizer(wide)
    named = load_backbone(wide, tokenizer="package:nano/spiece.model").tokenizer
    assert named is not None and named.name.endswith("nano/spiece.model")
    tokenizer = load_tokenizer("package:nano")
    assert load_backbone(wide, tokenizer=tokenizer).tokenizer is tokenizer


@pytest.mark.parametrize("where", ["checkpoint_3", "."])
def test_a_vocabulary_that_is_too_large_is_found_before_the_weights_are_read(
    legacy, where, monkeypatch
):
    """Beside a T5X checkpoint or in it; and as an argument."""
    monkeypatch.setattr(backbones, "place", None)
    with pytest.raises(InputError, match="its 384 ids do not fit the model's 256 embedding rows"):
        load_backbone(legacy, tokenizer="byt5")
    write_nano_tokenizer(legacy.parent / where)
    with pytest.raises(InputError, match="8192 ids do not fit the model's 256 embedding rows"):
        load_backbone(legacy.parent)


def test_a_backbone_is_saved_below_home(tmp_path, t5_1_1, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save_backbone("~/hf", t5_1_1.config, t5_1_1.variables["params"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    assert load_backbone("~/hf").fingerprint == t5_1_1.fingerprint


def test_a_saved_backbone_brings_its_tokenizer(tmp_path, wide):
    write_nano_tokenizer(wide)
    loaded = load_backbone(wide)
    params = loaded.variables["params"]
    save_backbone(tmp_path / "copy", loaded.config, params, tokenizer=loaded.tokenizer)
    copy = load_backbone(tmp_path / "copy")
    assert copy.tokenizer is not None
    assert copy.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    assert copy.fingerprint == loaded.fingerprint
    description = describe.describe(tmp_path / "copy")
    assert description["tokenizer_fingerprint"] == loaded.tokenizer.fingerprint
    count = sum(x.size for x in jax.tree.leaves(params))
    assert (description["parameters"], description["bytes"]) == (count, 2 * count)  # bfloat16
