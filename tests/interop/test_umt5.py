"""umT5: a table of relative position biases in every layer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import Tiny
from jax.sharding import PartitionSpec as P
from oracles import record_models as recorded
from t5_ids import T5_IDS, decode, with_lengths
from test_transformers_readings import FIVE, TOLERANCE, about, make_folder, recorded_logits

from ptjax.backbones.load import Backbone, load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.batch import shift_right
from ptjax.errors import InputError
from ptjax.interop import huggingface, huggingface_format
from ptjax.models.config import T5Config
from ptjax.models.prompted import PromptedT5
from ptjax.models.t5 import parameter_shapes
from ptjax.planning.flops import count_flops
from ptjax.sharding.rules import check_rules
from ptjax.trees import flatten_paths

KEYS = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_folder(tmp_path_factory.mktemp("umt5"), head="own", model_type="umt5", **KEYS)


@pytest.fixture(scope="module")
def umt5(folder: Any) -> Backbone:
    return load_backbone(folder)


def logits_of(backbone: Backbone) -> np.ndarray:
    apply_fn = jax.jit(with_lengths(backbone.apply_fn))
    return np.asarray(apply_fn(backbone.variables, recorded.INPUTS, recorded.TARGETS))


def test_case_1_12_logits_are_those_of_transformers(umt5):
    assert umt5.config.relpos_per_layer and not umt5.config.logits_via_embedding
    np.testing.assert_allclose(
        logits_of(umt5), recorded_logits(FIVE, "umt5"), atol=TOLERANCE, rtol=0
    )
    assert about(FIVE)["transformers"] == FIVE


def test_case_1_12_what_is_saved_is_the_same_umt5(tmp_path, folder, umt5):
    save_backbone(tmp_path, umt5.config, umt5.variables["params"], dtype="float32")
    raw = json.loads((tmp_path / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("umt5", ["UMT5ForConditionalGeneration"])
    saved = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    original = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(saved) == set(original)
    for name, value in original.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    again = load_backbone(tmp_path)
    assert again.config == umt5.config


def test_case_1_12_names_are_an_inverse_pair():
    theirs = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert huggingface_format.to_t5x(theirs) == ("encoder/relpos_bias/rel_embedding", True)
    ours = "encoder/layers_0/relpos_bias/rel_embedding"
    assert huggingface_format.to_t5x(theirs, relpos_per_layer=True) == (ours, True)
    config = T5Config(32, 16, 4, 2, 1, 6, 24, relpos_per_layer=True)
    shapes = flatten_paths(parameter_shapes(config))
    assert sum("relpos" in name for name in shapes) == 3
    for name in shapes:
        pair = huggingface_format.to_huggingface(name)
        assert pair is not None, name
        assert huggingface_format.to_t5x(pair[0], relpos_per_layer=True) == (name, pair[1])
    fields = dataclasses.asdict(config)
    assert {*huggingface_format.expected_names(fields), huggingface_format.LOGITS} == set(shapes)


@pytest.mark.parametrize(("said", "is_"), [("t5", "umt5"), ("umt5", "t5")])
def test_case_1_12_a_table_too_many_or_too_few_is_named(tmp_path, said, is_):
    make_folder(tmp_path, head="own", model_type=is_, **KEYS)
    config = recorded.config_of(said, **KEYS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.weight|decoder"
    with pytest.raises(InputError, match=message):
        huggingface.load_huggingface(tmp_path)


# Of every way to run it, the logits are those of the plain one. Random weights suffice from here.


@pytest.fixture(scope="module")
def tiny_umt5(tiny: Tiny) -> Tiny:
    config = dataclasses.replace(tiny.config, relpos_per_layer=True)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: random.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32),
        parameter_shapes(config),
    )
    return Tiny(config, params, tiny.prompt)


def stacked(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as `scan_layers` holds them."""
    out: dict[str, Any] = {}
    for name, part in params.items():
        layers = [part[f"layers_{i}"] for i in range(2) if f"layers_{i}" in part]
        rest = {key: value for key, value in part.items() if not key.startswith("layers_")}
        joined = {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)} if layers else {}
        out[name] = rest | joined
    return out


@pytest.mark.parametrize("attends_to_input", [True, False])
def test_case_1_12_scanned_layers_and_prompts(tiny_umt5, tiny_batch, attends_to_input):
    """A prompt before the text, either kind; layers written out and scanned over."""
    inputs, targets = tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]
    logits = []
    for scan in (False, True):
        config = dataclasses.replace(tiny_umt5.config, scan_layers=scan)
        params = stacked(tiny_umt5.params) if scan else tiny_umt5.params
        variables = tiny_umt5.variables | {"params": params}
        network = PromptedT5(config, attends_to_input=attends_to_input)
        logits.append(np.asarray(jax.jit(with_lengths(network.apply))(variables, inputs, targets)))
    assert logits[0].std() > 0.1
    # float32, compiled in two ways.
    np.testing.assert_allclose(*logits, atol=1e-4, rtol=0)


def test_case_1_12_on_a_mesh_and_in_int8(folder, umt5):
    """Sharded over `model`, divided over `data` too, and with kernels in a byte an entry."""
    plain = logits_of(umt5)
    settings = {"mesh": "2x4", "fsdp": True, "scan_layers": True}
    sharded = load_backbone(folder, **settings)
    paths = flatten_paths(sharded.variables)
    table = paths["params/encoder/layers/relpos_bias/rel_embedding"]
    assert table.shape == (2, 4, 8) and table.sharding.spec == P(None, "model", None)
    np.testing.assert_allclose(logits_of(sharded), plain, atol=TOLERANCE, rtol=0)
    rounded = flatten_paths(load_backbone(folder, quantize="int8").variables)
    name = "params/encoder/layers_1/relpos_bias/rel_embedding"
    np.testing.assert_array_equal(rounded[name], flatten_paths(umt5.variables)[name])


def test_case_1_12_planning_knows_its_parameters_and_work(tiny, tiny_umt5, tiny_batch):
    shapes = {"params": parameter_shapes(tiny_umt5.config)}
    check_rules(shapes)
    [one, many] = (
        sum(np.prod(x.shape) for x in jax.tree.leaves(parameter_shapes(t.config)))
        for t in (tiny, tiny_umt5)
    )
    assert many - one == 2 * 4 * 32  # a table [H, buckets] more in each stack of two layers
    batch = [tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]]
    work = [count_flops(with_lengths(t.apply_fn()), t.variables, *batch) for t in (tiny, tiny_umt5)]
    assert work[0] == work[1] > 0  # a table is looked up, not multiplied


def test_case_1_12_cached_decoding_sees_every_layer_s_table(tiny_umt5, tiny_batch):
    """Greedy, a token at a time, is the argmax of whole targets."""
    inputs, variables = tiny_batch["encoder_input_tokens"], tiny_umt5.variables
    tokens = np.asarray(
        decode(PromptedT5(tiny_umt5.config).apply, variables, inputs, max_length=5)[0]
    )
    apply_fn = with_lengths(tiny_umt5.jitted())
    logits = np.asarray(apply_fn(variables, inputs, shift_right(tokens, T5_IDS.decoder_start_id)))
    ended = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    np.testing.assert_array_equal(tokens[~ended], logits.argmax(-1)[~ended])


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
def test_case_1_12_transformers_reads_the_umt5_that_ptjax_wrote(tmp_path, tiny_umt5, tied):
    import transformers

    config = dataclasses.replace(
        tiny_umt5.config, vocab_size=32, logits_via_embedding=tied, relpos_buckets=8
    )
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: random.normal(x.ndim == 1, 0.2, x.shape).astype(np.float32),
        parameter_shapes(config),
    )
    save_backbone(tmp_path, config, params, dtype="float32")
    model, report = transformers.UMT5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs, _ = recorded.run(model.eval())
    assert theirs.std() > 0.1
    np.testing.assert_allclose(logits_of(load_backbone(tmp_path)), theirs, atol=TOLERANCE, rtol=0)
    # What transformers writes of it is the same backbone again.
    model.save_pretrained(tmp_path / "again")
    again = load_backbone(tmp_path / "again")
    assert dataclasses.replace(again.config, dropout_rate=0.1) == config
