"""A prompt for every row: each row of a mixed batch against a run of its prompt alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letters import LETTERS, make_backbone, random_texts, text_source
from t5_ids import T5_IDS, decode, with_lengths

from ptjax.data.tasks import Task
from ptjax.errors import InputError
from ptjax.inference import forward, generate, predict
from ptjax.inference.bank import PromptBank, make_bank, place_bank
from ptjax.inference.batches import input_buckets
from ptjax.inference.labels import make_label_tokens, predict_labels
from ptjax.inference.model import bind
from ptjax.inference.prompts import check_bank, open_prompt
from ptjax.inference.records import InputFormat
from ptjax.interop.prompt_file import PromptFile
from ptjax.models.prompt import stack_prompts
from ptjax.models.prompted import make_apply_fn, with_prompt
from ptjax.sharding.arrays import replicated
from ptjax.sharding.meshes import make_mesh

RNG = np.random.default_rng(5)
NAMES = ("short", "blind", "long", "blind_long")
MATRICES = [RNG.normal(size=(n, 16)).astype(np.float32) for n in (3, 4, 7, 6)]
SEES = [True, False, True, False]
IDS = np.array([0, -1, 2, 1, 3, 0, -1, 2], np.int32)
LENGTHS = [(24, 4), (9, 6), (12, 4), (31, 5)]


@pytest.fixture(scope="module")
def backbone(tiny):
    return make_backbone(tiny)


def files() -> dict[str, PromptFile]:
    """The four prompts as they come from files, with lengths and tasks of their own."""
    return {
        name: PromptFile(
            matrix,
            {
                "backbone_fingerprint": "sha256:0",
                "sees_input": sees,
                "input_length": lengths[0],
                "target_length": lengths[1],
            },
        )
        for name, matrix, sees, lengths in zip(NAMES, MATRICES, SEES, LENGTHS, strict=True)
    }


@pytest.fixture(scope="module")
def bank() -> PromptBank:
    return make_bank(files())


@pytest.fixture(scope="module")
def tokens(tiny_batch):
    return tiny_batch["encoder_input_tokens"], tiny_batch["decoder_input_tokens"]


@functools.cache
def jitted(config, attends_to_input: bool):
    return jax.jit(with_lengths(make_apply_fn(config, attends_to_input)), static_argnames="method")


def alone(tiny, i: int) -> tuple[bool, dict[str, Any]]:
    """Whether prompt i sees its input, and the variables of a run with it alone."""
    prompt = None if i < 0 else MATRICES[i]
    return i < 0 or SEES[i], with_prompt({"params": tiny.params}, prompt)


def test_a_bank_stands_on_the_right(bank):
    arrays = bank.arrays
    assert arrays.prompt.shape == (4, 7, 16)
    assert (arrays.lengths.tolist(), arrays.attends_to_input.tolist()) == ([3, 4, 7, 6], SEES)
    assert arrays.prompt.dtype == np.float32 and arrays.lengths.dtype == np.int32
    np.testing.assert_array_equal(arrays.prompt[0, 4:], MATRICES[0])
    assert not arrays.prompt[0, :4].any()
    same = stack_prompts(jnp.ones((2, 3, 16)), attends_to_input=False)
    assert same.prompt.shape == (2, 3, 16) and not same.attends_to_input.any()


def test_every_row_is_the_run_of_its_prompt_alone(tiny, bank, tokens):
    mixed = jitted(tiny.config, True)(
        with_prompt({"params": tiny.params}, bank.arrays), *tokens, prompt_ids=IDS
    )
    wants = []
    for i in range(-1, 4):
        attends_to_input, variables = alone(tiny, i)
        want = jitted(tiny.config, attends_to_input)(variables, *tokens)
        np.testing.assert_allclose(mixed[i == IDS], want[i == IDS], rtol=0, atol=2e-5)
        wants.append(want)
    # No two of them say the same, so each row could be told from its neighbours'.
    for one, want in enumerate(wants):
        for other in wants[:one]:
            assert np.abs(want - other).max() > 1e-2


def test_the_encoder_reads_past_what_is_not_there(tiny, bank, tokens):
    """Padding in front: the decoder reads a row's own prompt and text, and nothing else."""
    variables = with_prompt({"params": tiny.params}, bank.arrays)
    encoded = jitted(tiny.config, True)(variables, tokens[0], prompt_ids=IDS, method="encode")
    lengths = np.array([0 if i < 0 else len(MATRICES[i]) for i in IDS])
    own = np.arange(7) >= 7 - lengths[:, None]
    np.testing.assert_array_equal(encoded.segment_ids, np.concatenate([own, tokens[0] > 0], axis=1))


def test_beams_of_a_mixed_batch(tiny, bank, tokens):
    settings = dict(max_length=6, num_beams=3)
    written, scores = decode(
        make_apply_fn(tiny.config),
        with_prompt({"params": tiny.params}, bank.arrays),
        tokens[0],
        prompt_ids=IDS,
        **settings,
    )
    for i in range(-1, 4):
        attends_to_input, variables = alone(tiny, i)
        want = decode(
            make_apply_fn(tiny.config, attends_to_input), variables, tokens[0], **settings
        )
        np.testing.assert_array_equal(written[i == IDS], want[0][i == IDS])
        np.testing.assert_allclose(scores[i == IDS], want[1][i == IDS], rtol=0, atol=1e-4)


def test_one_compiled_function_serves_any_mix(backbone, tiny, bank):
    traced = []

    def apply_fn(*args, **kwargs):  # it runs only while jax traces
        traced.append(kwargs.get("method"))
        return make_apply_fn(tiny.config)(*args, **kwargs)

    source = text_source(random_texts(16, 11))
    assert len(input_buckets(source)) == 1
    labels = [make_label_tokens(x, LETTERS, 8, T5_IDS) for x in (["a", "bc"], ["d", "e", "f"])]
    bound = bind(backbone, open_prompt(backbone, bank))
    for number in range(4):
        mix = np.random.default_rng(number).permutation(np.tile(IDS, 2))
        if number < 2:
            mix = np.full_like(mix, -number)  # one prompt for all, none for any
        other = bank.arrays._replace(prompt=bank.arrays.prompt * (1 + number))
        variables = with_prompt({"params": tiny.params}, place_bank(other, backbone.mesh))
        model = dataclasses.replace(bound, apply_fn=apply_fn, variables=variables)
        sets = (mix > 0).astype(np.int32)
        predict_labels(model, source, labels, 16, label_sets=sets, prompt_ids=mix)
        generate.generate_tokens(model, source, 16, max_new_tokens=3, prompt_ids=mix)
        assert traced.count("encode") == 2


@pytest.mark.parametrize("batch_size", [8, 3])  # 3 rows are rounded up to a share per device
def test_a_mesh_shares_the_rows_and_their_prompts(backbone, bank, batch_size):
    mesh = make_mesh(2)
    alone = bind(backbone, open_prompt(backbone, bank))
    placed = jax.device_put(alone.variables, replicated(mesh))
    source = text_source(random_texts(8, 15))
    labels = make_label_tokens("abc", LETTERS, 2, T5_IDS)
    likelihoods = [
        predict_labels(model, source, [labels], batch_size, prompt_ids=IDS)[1]
        for model in (dataclasses.replace(alone, variables=placed, mesh=mesh), alone)
    ]
    np.testing.assert_allclose(*likelihoods, rtol=0, atol=1e-4)


# From Python


def test_forward_takes_names_numbers_and_none(backbone, bank, tiny_batch, tiny, tokens):
    mixed = forward.forward(backbone, tiny_batch, bank, IDS)
    names = [None, *NAMES]
    said = [names[i + 1] for i in IDS]
    np.testing.assert_array_equal(forward.forward(backbone, tiny_batch, bank, said), mixed)
    said[1] = "none"
    np.testing.assert_array_equal(forward.forward(backbone, tiny_batch, bank, said), mixed)
    want = forward.forward(backbone, tiny_batch, files()["blind"])
    np.testing.assert_allclose(mixed[3], want[3], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "names"),
    [({}, [*NAMES, None]), ({"temperature": 1.5, "seed": 3}, ["blind", "long"])],
)
def test_generated_texts_keep_their_order_and_their_prompts_lengths(
    backbone, bank, settings, names
):
    texts = random_texts(13)
    ids = np.resize(IDS, 13).tolist()
    mixed, scores = generate.generate_with_scores(
        backbone, texts, bank, prompt_ids=ids, batch_size=4, max_new_tokens=None, **settings
    )
    for name in names:
        prompt = None if name is None else files()[name]
        want, want_scores = generate.generate_with_scores(backbone, texts, prompt, **settings)
        rows = [row for row in range(13) if ids[row] == (NAMES.index(name) if name else -1)]
        assert rows and [mixed[row] for row in rows] == [want[row] for row in rows]
        np.testing.assert_allclose(scores[rows], want_scores[rows], rtol=1e-4)
    assert len(set(map(len, mixed))) > 2


def test_ranking_takes_every_texts_own_labels_and_lengths(backbone, bank):
    texts = random_texts(13)
    ids = np.resize(IDS, 13)
    sets = {-1: ("x", "y"), 0: ("yes", "no", "maybe"), 1: ("b", "a"), 2: ("x", "y"), 3: ("q", "r")}
    said: dict[str, Any] = dict(input_length=[9 + i % 3 for i in range(13)])
    mixed = predict.rank(
        backbone, texts, [sets[int(i)] for i in ids], bank, prompt_ids=ids, batch_size=4, **said
    )
    for i in range(-1, 4):
        prompt = None if i < 0 else files()[NAMES[i]]
        want = predict.rank(backbone, texts, sets[i], prompt, **said)
        for row in np.flatnonzero(ids == i):
            assert mixed[row].text == want[row].text
            assert mixed[row].score == pytest.approx(want[row].score, abs=1e-4)
            assert mixed[row].probabilities == pytest.approx(want[row].probabilities, abs=1e-4)
            assert tuple(mixed[row].probabilities or ()) == sets[i]


def test_predictions_rank_or_write_as_each_prompts_task_wants(backbone, bank):
    closed = Task(name="c", inputs="{t}", label="l", verbalizer={"0": "no", "1": "yes"})
    opened = Task(name="o", inputs="{t}", targets="{t}")
    tasks = [closed, opened, None]
    texts = random_texts(9)
    formats = [InputFormat(tasks[i % 3], 20, 4 + i % 2) for i in range(9)]
    ids = [i % 5 - 1 for i in range(9)]
    settings: dict[str, Any] = dict(num_beams=2, temperature=0.0, top_p=1.0)
    found = predict.predict_texts(backbone, texts, formats, bank, ids, **settings)
    own: dict[str, Any] = dict(prompt_ids=ids, input_length=20)
    ranked = predict.rank(backbone, texts, ("no", "yes"), bank, **own)
    longest = [4 + i % 2 for i in range(9)]
    wrote = predict.generate_answers(
        backbone, texts, bank, max_new_tokens=longest, **own, **settings
    )
    for i, one in enumerate(found):
        want = wrote[i] if i % 3 else ranked[i]
        assert (one.text, one.probabilities is None) == (want.text, i % 3 > 0)
        assert one.score == pytest.approx(want.score, abs=1e-4)
    written = predict.predict_texts(
        backbone, texts, formats, bank, ids, decode=True, max_new_tokens=2, **settings
    )
    assert all(one.probabilities is None and len(one.text) <= 2 for one in written)


@pytest.mark.parametrize("setting", [{"num_beams": 2}, {"temperature": 0.5}, {"top_p": 0.5}])
def test_settings_of_generation_need_a_text_to_generate(backbone, setting):
    closed = Task(name="c", inputs="{t}", label="l", verbalizer={"0": "no", "1": "yes"})
    run = functools.partial(predict.predict_texts, backbone, ["ab"])
    with pytest.raises(InputError, match=r"closed set of labels \(no, yes\), .* need --decode"):
        run([InputFormat(closed)], **setting)
    # What generates as ever does not matter, nor does the seed of a sample that nobody draws.
    plain: dict[str, Any] = {"num_beams": 1, "temperature": 0.0, "top_p": 1.0, "seed": 3}
    assert run([InputFormat(closed)], **plain) == predict.rank(backbone, ["ab"], ("no", "yes"))
    [written] = run([InputFormat(closed)], decode=True, max_new_tokens=2, **setting)
    assert written == predict.generate_answers(backbone, ["ab"], max_new_tokens=2, **setting)[0]


def test_nothing_to_predict(backbone, bank):
    assert predict.rank(backbone, [], ("no", "yes"), bank, prompt_ids=[]) == []
    assert predict.predict_texts(backbone, [], [], bank, []) == []


def test_a_bank_is_placed_and_checked_once(backbone, bank, caplog):
    bare = make_bank({"a": PromptFile(MATRICES[0], {}), "b": MATRICES[1]})
    checked = check_bank(backbone, bare)
    assert [r.getMessage() for r in caplog.records] == [
        "prompt 'a' does not say which backbone it was tuned on; only the width was checked"
    ]
    caplog.clear()
    generate.generate(backbone, ["x"], checked, prompt_ids=["b"], max_new_tokens=2)
    assert not caplog.records
    assert isinstance(checked.arrays.prompt, jax.Array) and checked.metadata[1] is None


# What is refused


def test_a_bank_of_unequal_widths_names_the_member(backbone):
    with pytest.raises(InputError, match=r"prompt 'b' has .* \[3, 8\], prompt 'a' \[3, 16\]"):
        make_bank({"a": MATRICES[0], "b": MATRICES[0][:, :8]})
    with pytest.raises(InputError, match=r"prompt 'a' has shape \[16\]"):
        make_bank({"a": MATRICES[0][0]})
    with pytest.raises(InputError, match="a prompt at least"):
        make_bank({})
    narrow = make_bank({"a": MATRICES[0][:, :8], "b": MATRICES[2][:, :8]})
    with pytest.raises(InputError, match=r"prompt 'a' \[3, 8\] does not fit tiny, whose"):
        generate.generate(backbone, ["x"], narrow, prompt_ids=["a"])


def test_a_member_of_another_backbone_is_named(backbone):
    members = files() | {"odd": PromptFile(MATRICES[0], {"backbone_fingerprint": "sha256:1"})}
    with pytest.raises(InputError, match="prompt 'odd' was tuned on a backbone with the backbone"):
        generate.generate(backbone, ["x"], make_bank(members), prompt_ids=["short"])
    allowed = check_bank(backbone, make_bank(members), allow_mismatch=True)
    generate.generate(backbone, ["x"], allowed, prompt_ids=["odd"], max_new_tokens=2)


@pytest.mark.parametrize(
    ("prompt_ids", "message"),
    [
        (["short", "bilnd"], r"prompt_ids\[1\]: no prompt is called 'bilnd'; did you mean blind"),
        (["short", 4], r"prompt_ids\[1\]: no prompt has the number 4; there are 4"),
        (["short", -2], "no prompt has the number -2"),
        (["short", True], "no prompt has the number True"),
        (["short"], r"one entry per example \(2\), got 1"),
        ("xy", r"one entry per example \(2\), got 'xy'"),
        (None, "needs prompt_ids"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(backbone, bank, prompt_ids, message):
    with pytest.raises(InputError, match=message):
        generate.generate(backbone, ["x", "y"], bank, prompt_ids=prompt_ids)


def test_a_choice_without_a_bank_and_the_other_way_round(backbone, bank, tiny, tiny_batch, tokens):
    with pytest.raises(InputError, match="choose from a bank"):
        generate.generate(backbone, ["x"], tiny.prompt, prompt_ids=[0])
    with pytest.raises(InputError, match="one prompt is needed here, not a bank"):
        forward.loss_and_prompt_gradient(backbone, tiny_batch, bank)
    apply_fn, plain, ids = (
        with_lengths(make_apply_fn(tiny.config)),
        {"params": tiny.params},
        jnp.asarray(IDS),
    )
    many = with_prompt(plain, bank.arrays)
    for variables, settings, message in (
        (many, {}, "a bank of prompts needs prompt_ids"),
        (tiny.variables, {"prompt_ids": ids}, "without a bank"),
        (plain, {"prompt_ids": ids}, "without a bank"),
        (
            many,
            {"prompt_ids": ids, "encoder_segment_ids": jnp.asarray(tokens[0])},
            "packed rows",
        ),
    ):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(functools.partial(apply_fn, **settings), variables, *tokens)
