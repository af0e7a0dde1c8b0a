"""Model tuning: everything trains; its exports are models."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ptjax.backbones.save import save_backbone
from ptjax.data.batching import Batching
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.interop.own_names import save_own_names
from ptjax.methods.model_tuning import ModelTuning
from ptjax.training.freeze import make_freeze
from ptjax.trees import flatten_paths


@pytest.fixture
def export(backbone, tmp_path):
    """A folder that `save` wrote, of weights that are 1 larger than the backbone's."""
    folder = tmp_path / "best"
    params = jax.tree.map(lambda x: np.asarray(x, np.float32) + 1, backbone.variables["params"])
    ModelTuning().save(folder, {"params": params}, {"step": 1}, backbone)
    return folder


def test_all_weights_train() -> None:
    variables = {"params": {"encoder": {"w": 0}, "decoder": {"w": 0}}}
    assert make_freeze(variables, ModelTuning().freeze_rules()) == {
        "params": {"encoder": {"w": False}, "decoder": {"w": False}}
    }


def test_it_has_no_variables_of_its_own(backbone) -> None:
    method = ModelTuning()
    assert (method.name, method.collection, method.exports) == ("model_tuning", "params", "model")
    assert method.variable_shapes(backbone.config) == {}
    assert method.extra_positions() == 0
    assert not method.supports_rows and not method.supports_sweep


def test_it_has_no_settings() -> None:
    """So two runs of it have the same method."""
    assert ModelTuning() == ModelTuning()
    assert hash(ModelTuning()) == hash(ModelTuning())


def test_int8_weights_do_not_train() -> None:
    network = SimpleNamespace(quantize=None, config=None)
    ModelTuning().check(network, Batching())  # pyright: ignore[reportArgumentType]
    network.quantize = "int8"
    with pytest.raises(InputError, match=r"int8 kernels do not train: set --gin\.QUANTIZE=None"):
        ModelTuning().check(network, Batching())  # pyright: ignore[reportArgumentType]


def test_an_export_loads_as_the_whole_network(backbone, export) -> None:
    assert ModelTuning().read_metadata(export) == {}
    loaded = ModelTuning().load(export, backbone)
    assert set(loaded) == {"params"}
    before, after = flatten_paths(backbone.variables["params"]), flatten_paths(loaded["params"])
    assert set(after) == set(before)
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        np.testing.assert_array_equal(array, before[name] + 1)


def test_an_export_is_float32_whatever_the_network_computes_in(backbone, export) -> None:
    # A bfloat16 file would be half as large.
    count = sum(x.size for x in jax.tree.leaves(backbone.variables["params"]))
    assert (export / "model.safetensors").stat().st_size > 4 * count


def test_an_export_keeps_the_tokenizer(backbone, export) -> None:
    text = "a lovely film"
    assert load_tokenizer(export).encode(text) == backbone.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("file", "message"),
    [("config.json", "the file is missing"), ("model.safetensors", "no weights here")],
)
def test_an_export_without_a_file_of_the_model_is_refused(export, file, message) -> None:
    (export / file).unlink()
    with pytest.raises(InputError, match=message):
        ModelTuning().read_metadata(export)


def test_truncated_weights_are_refused(export) -> None:
    weights = export / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        ModelTuning().read_metadata(export)


def test_an_empty_file_beside_the_weights_is_refused(export) -> None:
    """A full disk leaves them; the tokenizer would fail only where the model is used."""
    (export / "tokenizer.json").write_bytes(b"")
    with pytest.raises(InputError, match=r"best/tokenizer\.json: the file is empty$"):
        ModelTuning().read_metadata(export)


def test_weights_in_several_files_are_an_export_too(backbone, tmp_path) -> None:
    params = backbone.variables["params"]
    save_backbone(tmp_path, backbone.config, params, max_shard_bytes=300_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert ModelTuning().read_metadata(tmp_path) == {}


def test_weights_under_their_own_names_are_an_export_too(tmp_path) -> None:
    save_own_names(tmp_path, {"layer/kernel": np.ones((4, 4), np.float32)}, "float32")
    assert ModelTuning().read_metadata(tmp_path) == {}
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match=r"model\.safetensors: "):
        ModelTuning().read_metadata(tmp_path)
