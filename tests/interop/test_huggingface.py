"""Hugging Face directories: names, config.json, weights in and out, the hub."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil

import huggingface_hub
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from ptjax.errors import InputError
from ptjax.interop import huggingface, huggingface_format, safetensors_file, t5x
from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.trees import flatten_paths

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
PARITY = FIXTURES / "torch_parity"
TORCH = FIXTURES / "torch_bin"
CONFIGS = {
    "1.0": T5Config(
        vocab_size=40,
        emb_dim=8,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=3,
        head_dim=4,
        mlp_dim=12,
        mlp_activations=("relu",),
        logits_via_embedding=True,
    ),
    # As ByT5: H * K is not D, the encoder is deeper, and the sizes all differ.
    "1.1": T5Config(
        vocab_size=50,
        emb_dim=10,
        num_heads=3,
        num_encoder_layers=3,
        num_decoder_layers=1,
        head_dim=4,
        mlp_dim=14,
        dropout_rate=0.05,
        relpos_buckets=16,
        relpos_max_distance=40,
        layer_norm_epsilon=1e-5,
    ),
}


def make_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in flatten_paths(parameter_shapes(config)).items()
    }


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(directory, change):
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def saved(tmp_path):
    """A directory of the 1.1 config that a test may break."""
    huggingface.save_huggingface(
        tmp_path, make_params(CONFIGS["1.1"]), CONFIGS["1.1"], dtype="float32"
    )
    return tmp_path


# Names


def test_names_are_an_inverse_pair_over_every_parameter(config):
    names = list(make_params(config))
    translated = [huggingface_format.to_huggingface(name) for name in names]
    assert len(set(translated)) == len(names)
    for name, pair in zip(names, translated, strict=True):
        assert pair is not None, name
        theirs, transposed = pair
        assert huggingface_format.to_t5x(theirs) == (name, transposed)
        assert transposed == name.endswith(("kernel", "rel_embedding"))
    assert huggingface_format.to_huggingface("encoder/prompt/prompt/prompt") is None
    assert huggingface_format.to_t5x("encoder.block.0.layer.0.SelfAttention.q.bias") is None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("token_embedder/embedding", "shared.weight"),
        (
            "decoder/relpos_bias/rel_embedding",
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        (
            "encoder/layers_11/attention/out/kernel",
            "encoder.block.11.layer.0.SelfAttention.o.weight",
        ),
        (
            "decoder/layers_3/encoder_decoder_attention/key/kernel",
            "decoder.block.3.layer.1.EncDecAttention.k.weight",
        ),
        (
            "decoder/layers_0/pre_cross_attention_layer_norm/scale",
            "decoder.block.0.layer.1.layer_norm.weight",
        ),
        (
            "encoder/layers_0/pre_mlp_layer_norm/scale",
            "encoder.block.0.layer.1.layer_norm.weight",
        ),
        (
            "decoder/layers_2/mlp/wi_1/kernel",
            "decoder.block.2.layer.2.DenseReluDense.wi_1.weight",
        ),
        ("decoder/decoder_norm/scale", "decoder.final_layer_norm.weight"),
        ("decoder/logits_dense/kernel", "lm_head.weight"),
    ],
)
def test_names(ours, theirs):
    """By hand: the pair above would also hold if both sides were wrong together."""
    assert huggingface_format.to_huggingface(ours)[0] == theirs


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1", "byt5_shaped"])
def test_what_transformers_wrote_has_every_parameter_of_its_config(name):
    arrays = huggingface.load_huggingface(PARITY / name)
    tied = "decoder/logits_dense/kernel" not in arrays
    assert tied == (name == "t5_1_0")
    config = T5Config(**huggingface.load_config(PARITY / name), logits_via_embedding=tied)
    assert {path: array.shape for path, array in arrays.items()} == {
        path: leaf.shape for path, leaf in flatten_paths(parameter_shapes(config)).items()
    }
    stored = safetensors.numpy.load_file(PARITY / name / "model.safetensors")
    np.testing.assert_array_equal(
        arrays["decoder/layers_0/mlp/wo/kernel"].read((slice(1, 9), slice(4, 6))),
        stored["decoder.block.0.layer.2.DenseReluDense.wo.weight"].T[1:9, 4:6],
    )


# config.json


def test_the_config_is_an_inverse_pair(tmp_path, config):
    huggingface.save_huggingface(tmp_path, make_params(config), config)
    fields = huggingface.load_config(tmp_path)
    assert dataclasses.replace(config, **fields) == config
    assert set(fields) >= {"relpos_max_distance", "layer_norm_epsilon", "mlp_activations"}
    assert "logits_via_embedding" not in fields


def test_what_the_config_of_2020_leaves_out(tmp_path):
    shutil.copytree(PARITY / "t5_1_0", tmp_path, dirs_exist_ok=True)

    def change(raw):
        for key in ("feed_forward_proj", "num_decoder_layers", "relative_attention_max_distance"):
            del raw[key]

    edit_json(tmp_path / "config.json", change)
    fields = huggingface.load_config(tmp_path)
    assert fields["mlp_activations"] == ("relu",)
    assert fields["num_decoder_layers"] == 2
    assert "relpos_max_distance" not in fields


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("d_kv", None, r"config\.json: the key 'd_kv' is missing"),
        ("num_layers", None, "the key 'num_layers' is missing"),
        ("d_model", "512", "emb_dim must be an integer, got '512'"),
        ("model_type", "bart", "unsupported model_type 'bart'"),
    ],
)
def test_a_config_that_is_no_t5_s(saved, key, value, message):
    edit_json(saved / "config.json", lambda raw: raw.pop(key) and raw.update({key: value}))
    if value is None:
        edit_json(saved / "config.json", lambda raw: raw.pop(key))
    with pytest.raises(InputError, match=message):
        huggingface.load_config(saved)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_truncated_config(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: the file is"):
        huggingface.load_huggingface(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: the file is missing"):
        huggingface.load_huggingface(saved)


# Weights, there and back


@pytest.mark.parametrize("limit", [None, 6_000])
def test_weights_come_back_bitwise(tmp_path, config, limit):
    params = make_params(config)
    huggingface.save_huggingface(tmp_path, params, config, dtype="float32", max_shard_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    if limit is None:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        assert len(files) > 2
        assert max(file.stat().st_size for file in files) <= limit
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    arrays = huggingface.load_huggingface(tmp_path)
    assert set(arrays) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(arrays[name].read_all(), value)
        part = tuple(slice(1, size - 1) for size in value.shape)
        np.testing.assert_array_equal(arrays[name].read(part), value[part])


def test_bfloat16_and_jax_arrays(tmp_path):
    config = CONFIGS["1.1"]
    params = {name: jnp.asarray(value) for name, value in make_params(config).items()}
    huggingface.save_huggingface(tmp_path, params, config, dtype="bfloat16")
    array = huggingface.load_huggingface(tmp_path)["decoder/logits_dense/kernel"]
    assert array.dtype == "bfloat16"
    expected = np.asarray(params["decoder/logits_dense/kernel"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(array.read_all(), expected)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_t5x_and_hugging_face_hold_the_same_weights(tmp_path):
    stored = t5x.load_t5x(FIXTURES / "t5_1_1_tiny_legacy")
    config = T5Config(
        vocab_size=256,
        emb_dim=32,
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=8,
        mlp_dim=64,
    )
    params = {name: array.read_all() for name, array in stored.items()}
    huggingface.save_huggingface(tmp_path, params, config, dtype="float32")
    for name, array in huggingface.load_huggingface(tmp_path).items():
        np.testing.assert_array_equal(array.read_all(), params[name])


def test_saving_again_leaves_nothing_of_the_last_time(tmp_path):
    config = CONFIGS["1.1"]
    save = huggingface.save_huggingface
    save(tmp_path, make_params(config, 0), config, dtype="float32")
    save(tmp_path, make_params(config, 1), config, dtype="float32", max_shard_bytes=6_000)
    assert not (tmp_path / "model.safetensors").exists()
    scale = "decoder/decoder_norm/scale"
    value = huggingface.load_huggingface(tmp_path)[scale].read_all()
    np.testing.assert_array_equal(value, make_params(config, 1)[scale])
    save(tmp_path, make_params(config, 0), config, dtype="float32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_that_was_cut_off_is_no_backbone(tmp_path, monkeypatch):
    config = CONFIGS["1.1"]
    save = huggingface.save_huggingface
    save(tmp_path, make_params(config, 0), config, max_shard_bytes=6_000)
    write = safetensors_file.save_safetensors

    def interrupted(path, *args, **kwargs):
        if path.name.startswith("model-00002"):
            raise KeyboardInterrupt
        write(path, *args, **kwargs)

    monkeypatch.setattr(safetensors_file, "save_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, make_params(config, 1), config, max_shard_bytes=6_000)
    with pytest.raises(InputError, match=r"config\.json: the file is missing"):
        huggingface.load_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "saved in float32 or bfloat16, not in float16"),
        ({"max_shard_bytes": 500}, "tensor .* alone takes"),
        ({"params": {"encoder/prompt/prompt/prompt": np.zeros((2, 3))}}, "has no equivalent"),
        (
            {"config": dataclasses.replace(CONFIGS["1.1"], mlp_activations=("linear", "gelu"))},
            "cannot be saved: Hugging Face's T5",
        ),
    ],
)
def test_what_cannot_be_saved_writes_nothing(tmp_path, change, message):
    arguments = {"params": make_params(CONFIGS["1.1"]), "config": CONFIGS["1.1"]} | change
    with pytest.raises(InputError, match=message):
        huggingface.save_huggingface(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


# Ties


def set_ties(directory, **keys):
    def change(raw):
        for key in ("tie_word_embeddings", "scale_decoder_outputs"):
            raw.pop(key, None)
        raw.update(keys)

    edit_json(directory / "config.json", change)


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}])
def test_a_head_that_repeats_the_embedding_is_a_tie(tmp_path, keys):
    shutil.copytree(PARITY / "t5_1_0", tmp_path, dirs_exist_ok=True)
    set_ties(tmp_path, **keys)
    edit_weights(tmp_path, lambda t: t.update({"lm_head.weight": t["shared.weight"].copy()}))
    assert "decoder/logits_dense/kernel" not in huggingface.load_huggingface(tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},  # transformers 5
    ],
)
def test_a_head_of_its_own_is_no_tie(saved, keys):
    set_ties(saved, **keys)
    arrays = huggingface.load_huggingface(saved)
    expected = make_params(CONFIGS["1.1"])["decoder/logits_dense/kernel"]
    np.testing.assert_array_equal(arrays["decoder/logits_dense/kernel"].read_all(), expected)


def test_transformers_5_may_tie_without_the_scale_and_scale_without_the_tie(saved):
    """Neither is T5X's network; the kernel takes the difference."""
    params = make_params(CONFIGS["1.1"])
    head = "decoder/logits_dense/kernel"
    set_ties(saved, tie_word_embeddings=True, scale_decoder_outputs=True)
    np.testing.assert_allclose(
        huggingface.load_huggingface(saved)[head].read_all(), params[head] / 10**0.5, rtol=1e-6
    )
    set_ties(saved, tie_word_embeddings=True, scale_decoder_outputs=False)
    edit_weights(saved, lambda tensors: tensors.pop("lm_head.weight"))
    np.testing.assert_array_equal(
        huggingface.load_huggingface(saved)[head].read_all(),
        params["token_embedder/embedding"].T,
    )


def test_an_untied_config_without_a_head_is_incomplete(saved):
    edit_weights(saved, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"lm_head\.weight \(parameter decoder/logits_dense"):
        huggingface.load_huggingface(saved)


def test_copies_of_the_embedding(saved):
    def rename(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] = (
            tensors.pop("shared.weight")
        )

    edit_weights(saved, rename)
    embedding = huggingface.load_huggingface(saved)["token_embedder/embedding"].read_all()
    np.testing.assert_array_equal(
        embedding, make_params(CONFIGS["1.1"])["token_embedder/embedding"]
    )
    edit_weights(saved, lambda t: t.update({"decoder.embed_tokens.weight": embedding + 1}))
    with pytest.raises(InputError, match=r"decoder\.embed_tokens.*differs from shared\.weight"):
        huggingface.load_huggingface(saved)


# pytorch_model.bin


def test_sharded_files_of_torch_hold_what_its_safetensors_hold():
    """One tied model, saved by torch.save in two files and by transformers as safetensors."""
    arrays = huggingface.load_huggingface(TORCH / "t5")
    expected = huggingface.load_huggingface(TORCH / "t5_safetensors")
    assert set(arrays) == set(expected)
    assert "decoder/logits_dense/kernel" not in arrays
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name].read_all(), array.read_all())


def test_safetensors_come_before_torch_s_files(saved):
    (saved / "pytorch_model.bin").write_bytes(b"never opened")
    assert huggingface.load_huggingface(saved)


# Broken directories


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights here, neither model\.safetensors nor"):
        huggingface.load_huggingface(saved)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("shared.weight", "token_embedder/embedding"),
        ("decoder.block.0.layer.2.DenseReluDense.wi_1.weight", "decoder/layers_0/mlp/wi_1/kernel"),
        ("encoder.block.2.layer.1.layer_norm.weight", "encoder/layers_2/pre_mlp_layer_norm/scale"),
    ],
)
def test_a_missing_tensor_is_named_in_both_languages(saved, theirs, ours):
    edit_weights(saved, lambda tensors: tensors.pop(theirs))
    with pytest.raises(InputError, match=rf"the tensor {theirs} \(parameter {ours}\) is missing"):
        huggingface.load_huggingface(saved)


def test_a_tensor_of_another_network_is_named(saved):
    edit_weights(saved, lambda t: t.update({"lora.weight": np.zeros((2, 2), np.float32)}))
    with pytest.raises(InputError, match=r"unexpected tensor lora\.weight: not part of a T5"):
        huggingface.load_huggingface(saved)


def test_a_tensor_of_another_rank_is_named(saved):
    edit_weights(saved, lambda t: t.update({"shared.weight": np.zeros(500, np.float32)}))
    with pytest.raises(InputError, match=r"the tensor shared\.weight has shape \[500\]"):
        huggingface.load_huggingface(saved)


def test_a_truncated_weights_file_is_named(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors: the file is truncated"):
        huggingface.load_huggingface(saved)


def test_a_broken_set_of_shards(tmp_path):
    config = CONFIGS["1.1"]
    huggingface.save_huggingface(
        tmp_path, make_params(config), config, dtype="float32", max_shard_bytes=6_000
    )
    index = tmp_path / "model.safetensors.index.json"
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    kept = first.read_bytes()
    first.unlink()
    listed = [k for k, v in json.loads(index.read_text())["weight_map"].items() if v == first.name]
    assert len(listed) > 1
    said = f"{first}: the file of tensor {listed[0]} and {len(listed) - 1} more is missing"
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        huggingface.load_huggingface(tmp_path)
    shutil.copy(second, first)
    with pytest.raises(InputError, match=rf"{first.name}: the tensor .* is missing from it"):
        huggingface.load_huggingface(tmp_path)
    first.write_bytes(kept)
    edit_json(index, lambda raw: raw["weight_map"].update({"lm_head.weight": "../x.safetensors"}))
    with pytest.raises(InputError, match=r"'\.\./x\.safetensors' of lm_head\.weight is not beside"):
        huggingface.load_huggingface(tmp_path)
    edit_json(index, lambda raw: raw["weight_map"].update({"lm_head.weight": 3}))
    with pytest.raises(InputError, match=r"the file 3 of lm_head\.weight is not beside"):
        huggingface.load_huggingface(tmp_path)
    for text in ("{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index\.json: the index is truncated or damaged"):
            huggingface.load_huggingface(tmp_path)


# The hub


def test_download_asks_for_torch_files_only_where_there_is_nothing_better(tmp_path, monkeypatch):
    commit = "0123456789abcdef"
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        directory = tmp_path / "snapshots" / commit
        directory.mkdir(parents=True, exist_ok=True)
        if repo_id == "google/flan-t5-small":
            (directory / "model.safetensors").touch()
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = huggingface.download("google/t5-small-lm-adapt", "main")
    assert found == (epath.Path(tmp_path / "snapshots" / commit), commit)
    assert [(repo, revision) for repo, revision, _ in asked] == [
        ("google/t5-small-lm-adapt", "main")
    ] * 2
    assert "pytorch_model.bin" not in asked[0][2]
    assert {"config.json", "spiece.model", "pytorch_model.bin"} <= set(asked[1][2])
    asked.clear()
    huggingface.download("google/flan-t5-small")
    assert len(asked) == 1


def test_what_the_cache_of_the_hub_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, folder = "0a" * 20, tmp_path / "models--google--t5"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert not huggingface.is_downloaded("google/t5")
    (folder / "snapshots" / commit / "config.json").touch()
    assert huggingface.is_downloaded("google/t5") and huggingface.is_downloaded("google/t5", commit)
    for repo_id, revision in (("google/t5", "0b" * 20), ("google/mt5", None), ("no such", None)):
        assert not huggingface.is_downloaded(repo_id, revision)


@pytest.mark.parametrize(
    ("repo_id", "reason"),
    [
        (
            "google/t5-small-lm-adapt",
            "not a local path, and the Hugging Face hub cannot be reached",
        ),
        ("no such name", "neither a local path nor a model id"),
    ],
)
def test_offline_is_one_line(tmp_path, monkeypatch, repo_id, reason):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"^{repo_id}: {reason}") as error:
        huggingface.download(repo_id)
    assert "\n" not in str(error.value)
