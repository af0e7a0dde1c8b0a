"""Which T5 a folder is: ties, scales and activations, as transformers reads and writes them.

`fixtures/transformers` holds what versions 4.57.6, 5.0.0 and 5.24.0 made of the same tiny weights;
`oracles/record_models.py` recorded it.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from conftest import FIXTURES
from etils import epath
from oracles import record_models as recorded
from t5_ids import with_lengths

from ptjax.backbones.load import load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.errors import InputError
from ptjax.interop import huggingface, huggingface_format
from ptjax.models.config import T5Config
from ptjax.models.layers import MLP

FOUR, FIVE_0, FIVE = "4.57.6", "5.0.0", "5.24.0"
# float32 on both sides, sums in another order; logits are of order 10.
TOLERANCE = 1e-4


def about(version: str) -> dict[str, Any]:
    return json.loads((FIXTURES / "transformers" / f"models-{version}.json").read_text())


def recorded_logits(version: str, name: str) -> np.ndarray:
    with np.load(FIXTURES / "transformers" / f"models-{version}.npz") as arrays:
        return arrays[name]


def make_folder(
    path: Path, *, head: str, gated: bool = True, model_type: str = "t5", **keys: Any
) -> Path:
    """A folder of the recorded weights with these keys in its config.json."""
    path.mkdir(parents=True, exist_ok=True)
    config = recorded.config_of(model_type, **keys)
    (path / "config.json").write_text(json.dumps(config))
    tensors = recorded.make_tensors(model_type, gated=gated, head=head)
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def reading_of(folder: Path, model_type: str) -> str:
    """What ptjax takes for the logits of such a folder, in the words of the record."""
    tensors = recorded.make_tensors(model_type, gated=True, head="own")
    arrays = huggingface.load_huggingface(folder)
    if huggingface_format.LOGITS not in arrays:
        return "embedding scaled"
    kernel = arrays[huggingface_format.LOGITS].read_all()
    factor = recorded.SIZES["d_model"] ** -0.5
    heads = {"embedding": tensors["shared.weight"], "own": tensors["lm_head.weight"]}
    for (weights, head), (scale, by) in itertools.product(
        heads.items(), {"unscaled": 1.0, "scaled": factor}.items()
    ):
        # A factor is multiplied in float32 once.
        if np.allclose(kernel, by * head.T, rtol=1e-6, atol=0):
            return f"{weights} {scale}"
    return "other weights"


def logits_of(folder: Path) -> np.ndarray:
    backbone = load_backbone(folder)
    apply_fn = jax.jit(with_lengths(backbone.apply_fn))
    return np.asarray(apply_fn(backbone.variables, recorded.INPUTS, recorded.TARGETS))


# Rows 1.7, 1.8, 1.15: ties and scales


@pytest.mark.parametrize("version", [FOUR, FIVE_0, FIVE])
def test_case_1_7_case_1_15_what_a_version_wrote_is_what_it_meant(tmp_path, version):
    """Every config.json that it writes, tied mT5 among them, is read as the model that it had."""
    written = about(version)["written"]
    assert len(written) == 15
    for number, (name, model) in enumerate(written.items()):
        if model["reading"] == "other weights":
            # 5.0.0 ties no embedding of an untied umT5 that it loads: it had random ones.
            assert (version, name) == (FIVE_0, "umt5 of version 4 saved again, head=own")
            continue
        config = model["config"]
        folder = make_folder(tmp_path / str(number), head=model["head"], **config)
        assert reading_of(folder, config["model_type"]) == model["reading"], name


def test_case_1_7_a_tied_mt5_has_the_logits_of_its_writer(tmp_path):
    written = {v: about(v)["written"]["mt5 made, tie_word_embeddings=True"] for v in (FOUR, FIVE)}
    for version, model in written.items():
        assert model["head"] == "none" and model["config"]["tie_word_embeddings"] is True
        make_folder(tmp_path / version, head="none", **model["config"])
    assert reading_of(tmp_path / FOUR, "mt5") == "embedding scaled"
    # Recorded is the same network with a head of its own, which is undone here.
    own = recorded.make_tensors("mt5", gated=True, head="own")
    untied = recorded_logits(FIVE, "mt5").astype(np.float64)
    states = untied @ np.linalg.pinv(own["lm_head.weight"].T.astype(np.float64))
    np.testing.assert_allclose(
        logits_of(tmp_path / FIVE), states @ own["shared.weight"].T, atol=TOLERANCE, rtol=0
    )


def test_case_1_8_every_folder_is_read_as_transformers_or_refused_with_both_readings(tmp_path):
    """81 combinations of network, keys and head, by no writer, by version 4, and by 5."""
    readings = {version: about(version)["readings"] for version in (FOUR, FIVE)}
    refused = []
    cases = itertools.product(
        recorded.KINDS, recorded.KEYS, recorded.KEYS, recorded.HEADS, (None, FOUR, FIVE)
    )
    for kind, tie, scale, head, writer in cases:
        key = recorded.folder_key(kind, tie, scale, head)
        raw = {
            "model_type": kind,
            "tie_word_embeddings": tie,
            "scale_decoder_outputs": scale,
            "transformers_version": writer,
        }
        raw = {name: value for name, value in raw.items() if value is not None}
        allowed = {readings[version][key] for version in (FOUR, FIVE)}
        try:
            logits = huggingface_format.read_logits(raw, head, epath.Path("x/config.json"))
        except InputError as error:
            refused.append((kind, tie, scale, head, writer))
            if any(reading.startswith("missing") for reading in allowed):
                assert "lm_head.weight (parameter decoder/logits_dense/kernel) is missing" in str(
                    error
                )
                continue
            assert len(allowed) == 2, (key, writer)  # nothing is refused that both read alike
            words = str(error).replace("by 1/sqrt(d_model)", "").replace("lm_head.weight", "own")
            for reading in allowed:
                weights, scaled = reading.split()
                assert f"{weights}, {scaled}" in words, (key, str(error))
            continue
        ours = f"{'own' if logits.own else 'embedding'} {'scaled' if logits.scaled else 'unscaled'}"
        assert ours in allowed, (key, writer)
        if writer == FIVE:
            assert ours == readings[FIVE][key], (key, writer)
        if writer == FOUR:
            assert ours == readings[FOUR][key], (key, writer)
    # What 5 wrote is refused only where a head is missing that the file itself asks for.
    by_5 = {(kind, tie, head) for kind, tie, _, head, writer in refused if writer == FIVE}
    assert by_5 == {*((kind, False, "none") for kind in recorded.KINDS), ("mt5", None, "none")}
    assert ("t5", True, None, "own", None) in refused
    assert ("mt5", True, None, "none", None) in refused
    assert ("t5", True, None, "own", FIVE) not in refused
    assert ("mt5", True, None, "none", FOUR) not in refused


def test_case_1_8_who_does_as_the_refusal_says_gets_that_reading():
    """Of all folders that are read in two ways: each of the two ways out leads to its reading."""
    file = epath.Path("x/config.json")
    cases = itertools.product(
        recorded.KINDS, recorded.KEYS, recorded.KEYS, recorded.HEADS, (None, "main", FOUR)
    )
    ways = set()
    for kind, tie, scale, head, writer in cases:
        keys = {"tie_word_embeddings": tie, "scale_decoder_outputs": scale}
        raw = {"model_type": kind, "transformers_version": writer} | keys
        raw = {name: value for name, value in raw.items() if value is not None}
        try:
            huggingface_format.read_logits(raw, head, file)
            continue
        except InputError as error:
            said = str(error)
        if "is missing" in said:
            continue
        by_4, by_5 = (said.split(f"transformers {x} uses ")[1] for x in "45")
        latter = huggingface_format.read_logits(raw | {"transformers_version": FIVE}, head, file)
        assert by_5.startswith(f"{latter}. To choose the latter, set")
        way = said.split("for the former, ")[1]
        if f'set it to "{FOUR}"' in way:
            raw["transformers_version"] = FOUR
        if 'remove "scale_decoder_outputs"' in way:
            del raw["scale_decoder_outputs"]
        if "remove lm_head.weight from the weights" in way:
            assert head == "own"
            head = "none"
        former = huggingface_format.read_logits(raw, head, file)
        assert by_4.startswith(f"{former};"), said
        ways.add(way)
    assert ways == {
        f'set it to "{FOUR}"',
        f'set it to "{FOUR}" and remove lm_head.weight from the weights',
        # What version 4 wrote.
        "remove lm_head.weight from the weights",
        'remove "scale_decoder_outputs"',
        'remove lm_head.weight from the weights and remove "scale_decoder_outputs"',
    }


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_case_1_8_a_tied_config_with_a_head_of_its_own(tmp_path, model_type, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    keys = {"tie_word_embeddings": True, "feed_forward_proj": "gated-gelu"}
    folder = make_folder(tmp_path, head="own", model_type=model_type, **keys)
    both = (
        "it records no version.*4 uses the embedding, scaled by.*5 uses lm_head.weight, "
        "scaled by.*remove lm_head.weight"
    )
    with pytest.raises(InputError, match=both):
        huggingface.load_huggingface(folder)
    make_folder(tmp_path, head="own", model_type=model_type, transformers_version=FIVE, **keys)
    assert reading_of(folder, model_type) == "own scaled"
    assert len(said) == 1 and "lm_head.weight is scaled by 1/sqrt(d_model)" in said[0]


def test_case_1_15_what_ptjax_writes_is_read_right_by_every_version(tmp_path):
    """5.0.0 scaled an untied T5 whose config had no word on it; this one has."""
    for version, tied in itertools.product((FOUR, FIVE_0, FIVE), (True, False)):
        config = T5Config(32, 16, 4, 2, 2, 6, 24, logits_via_embedding=tied)
        raw = huggingface_format.make_config_json(config, "float32")
        keys = [raw[key] for key in ("tie_word_embeddings", "scale_decoder_outputs")]
        key = recorded.folder_key(raw["model_type"], *keys, "none" if tied else "own")
        assert about(version)["readings"][key] == ("embedding scaled" if tied else "own unscaled")
    unsaid = recorded.folder_key("t5", False, None, "own")
    assert about(FIVE_0)["readings"][unsaid] == "own scaled"


# Row 1.9: activations


@pytest.mark.parametrize("version", [FOUR, FIVE])
def test_case_1_9_activations_are_those_that_transformers_takes(tmp_path, version):
    cases = about(version)["activations"]
    assert len(cases) == 28
    for name, case in cases.items():
        make_folder(tmp_path, head="own", **case["keys"])
        activations = huggingface_format.load_config(tmp_path)["mlp_activations"]
        function = huggingface_format._ACTIVATIONS[case["function"]]
        assert activations == ((function, "linear") if case["gated"] else (function,)), name


def test_case_1_9_every_activation_is_the_function_of_that_name():
    """`gelu` is exact there and an approximation in Flax: 5e-4 apart, far above the bound."""
    curves = about(FIVE)["curves"]
    config = T5Config(8, 7, 1, 1, 1, 1, 7)
    eye, grid = {"kernel": jnp.eye(7)}, jnp.asarray(recorded.CURVE[None, None], jnp.float32)
    for theirs, ours in huggingface_format._ACTIVATIONS.items():
        mlp = MLP(T5Config(**{**vars(config), "mlp_activations": (ours,)}))
        values = mlp.apply({"params": {"wi": eye, "wo": eye}}, grid, True)
        # Recorded to seven digits; float32.
        np.testing.assert_allclose(np.ravel(values), curves[theirs], atol=1e-6, err_msg=theirs)
    assert np.abs(np.subtract(curves["gelu"], curves["gelu_new"])).max() > 1e-4


@pytest.mark.parametrize("keys", recorded.LOGITS, ids=lambda keys: "-".join(map(str, keys[:2])))
def test_case_1_9_logits_are_those_of_transformers_and_come_back(tmp_path, keys):
    """UL2's gated-silu, and keys that contradict each other; saved again, the same network."""
    proj, function, is_gated = keys
    names = {"feed_forward_proj": proj, "dense_act_fn": function, "is_gated_act": is_gated}
    key = " ".join(f"{name}={value}" for name, value in ({"kind": "t5"} | names).items())
    gated = proj.startswith("gated")
    config = {"tie_word_embeddings": False, **names}
    folder = make_folder(tmp_path / "theirs", head="own", gated=gated, **config)
    backbone = load_backbone(folder)
    apply_fn = jax.jit(with_lengths(backbone.apply_fn))
    ours = np.asarray(apply_fn(backbone.variables, recorded.INPUTS, recorded.TARGETS))
    np.testing.assert_allclose(ours, recorded_logits(FIVE, key), atol=TOLERANCE, rtol=0)
    save_backbone(tmp_path / "ours", backbone.config, backbone.variables["params"], dtype="float32")
    assert load_backbone(tmp_path / "ours").config == backbone.config
    raw = json.loads((tmp_path / "ours" / "config.json").read_text())
    # No reader that knows one of the keys alone gets another function.
    alone = {"model_type": "t5", "feed_forward_proj": raw["feed_forward_proj"]}
    assert huggingface_format._read_activations(alone, epath.Path("x")) == tuple(
        backbone.config.mlp_activations
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"feed_forward_proj": "gated-sine"}, "feed_forward_proj is 'gated-sine'; .* relu, "),
        (
            {"feed_forward_proj": "relu", "dense_act_fn": "sine"},
            "dense_act_fn is 'sine'; supported",
        ),
        ({"feed_forward_proj": "relu", "dense_act_fn": ["x"]}, r"dense_act_fn is \['x'\]"),
        ({"feed_forward_proj": "half-gelu"}, "'half-gelu'; it must be the name of an activ"),
        ({"feed_forward_proj": 3}, "feed_forward_proj is 3; it must be"),
    ],
)
def test_case_1_9_an_activation_without_a_name_here_is_refused(tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        huggingface.load_config(make_folder(tmp_path, head="own", **keys))
