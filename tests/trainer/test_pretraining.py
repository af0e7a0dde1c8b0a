"""Pre-training end to end on a tiny T5: what it learns from, leaves, and goes on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import stopped_by_sigterm
from t5_ids import T5_IDS
from tiny import save_tiny, tiny_config

from ptjax.backbones.load import Backbone, load_backbone
from ptjax.data.mixture import PrefixLM, SpanCorruption, TaskComponent, TextFiles, TokenFile
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError
from ptjax.settings import TrainSchedule
from ptjax.trainer.pretrain import pretrain
from ptjax.training.optimizer import Adafactor

CONFIG = tiny_config(8192, dropout_rate=0.0, logits_via_embedding=True)
LINES = [f"The {a} {b} of the town was {c}." for a in ("old", "new") for b in ("mill", "bridge",
         "market", "school") for c in ("built of stone", "sold", "lost in a fire")]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = [json.dumps({"text": line, "label": str(i % 2)}) for i, line in enumerate(LINES)]
    (folder / "text.jsonl").write_text("\n".join(rows * 8) + "\n")
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Backbone:
    folder, tokenizer = tmp_path_factory.mktemp("start"), load_tokenizer("package:nano")
    return load_backbone(save_tiny(folder, CONFIG, tokenizer=tokenizer))


def mixture(corpus: Path) -> dict:
    task = Task(
        name="even",
        splits={"train": "text.jsonl"},
        data_dir=str(corpus),
        inputs="{text}",
        label="label",
        verbalizer={"0": "yes", "1": "no"},
    )
    phrasings = [("even: {text}", None), ("odd: {text}", {"0": "no", "1": "yes"})]
    return {
        "text": TextFiles({"text.jsonl": "text"}, data_dir=str(corpus)),
        "components": [
            SpanCorruption(0.25, batch_size=8, input_length=32),
            PrefixLM(0.25, batch_size=8, input_length=16, target_length=8),
            TaskComponent(0.5, task, phrasings, batch_size=8, input_length=32, target_length=4),
        ],
        "optimizer": Adafactor(learning_rate=0.02, multiply_by_parameter_scale=True),
        "schedule": TrainSchedule(train_steps=12, eval_period=6, log_period=6),
    }


def made(model_dir: Path) -> tuple[bytes, list]:
    rows = [json.loads(line) for line in (model_dir / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
    return (model_dir / "models" / "best" / "model.safetensors").read_bytes(), kept


@pytest.mark.slow
def test_from_scratch_stopped_and_gone_on(corpus, tmp_path):
    scratch = {"tokenizer": "package:nano", **mixture(corpus)}
    pretrain(CONFIG, model_dir=tmp_path / "whole", **scratch)
    weights, rows = made(tmp_path / "whole")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] < 1.1 * np.log(CONFIG.vocab_size)
    written = load_backbone(tmp_path / "whole" / "models" / "best")
    assert written.config == CONFIG and written.tokenizer is not None

    def again(callbacks):
        pretrain(CONFIG, model_dir=tmp_path / "stopped", **scratch, callbacks=callbacks)

    assert stopped_by_sigterm(8, again) == 143
    pretrain(CONFIG, model_dir=tmp_path / "stopped", **scratch)
    assert made(tmp_path / "stopped") == (weights, rows)


def test_text_that_was_tokenised_before(corpus, tmp_path):
    tokenizer = load_tokenizer("package:nano")
    text = TextFiles({"text.jsonl": "text"}, data_dir=str(corpus))
    ids = text.tokenize(tokenizer, 3)
    np.save(tmp_path / "ids.npy", ids)
    np.testing.assert_array_equal(TokenFile(f"{tmp_path}/ids.npy").tokenize(tokenizer, 3), ids)
    wrong = {
        "float.npy": (ids.astype(np.float32), r"float32 \[\d+\], but token ids are one vector"),
        "rows.npy": (ids[None], r"uint16 \[1, \d+\], but token ids are one vector"),
        "large.npy": (ids + np.uint16(8192), r"but the vocabulary has 8192; tokenise the text"),
        "object.npy": (np.array([{}]), "cannot be read as an .npy array"),
    }
    for name, (array, said) in wrong.items():
        np.save(tmp_path / name, array)
        with pytest.raises(InputError, match=rf"{name}: .*{said}"):
            TokenFile(f"{tmp_path}/{name}").tokenize(tokenizer, 3)
    for name, content in {"text.npy": b"hello", "none.npy": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: cannot be read as an .npy array"):
            TokenFile(f"{tmp_path}/{name}").tokenize(tokenizer, 3)


@pytest.mark.slow
def test_from_a_backbone(corpus, start, tmp_path):
    still = Adafactor(learning_rate=0.0, weight_decay=0.0)
    settings = mixture(corpus) | {
        "optimizer": still,
        "schedule": TrainSchedule(train_steps=1, eval_period=1),
    }
    pretrain(start, model_dir=tmp_path / "still", **settings)
    assert load_backbone(tmp_path / "still" / "models" / "best").fingerprint == start.fingerprint
    pretrain(start, model_dir=tmp_path / "moved", **mixture(corpus))
    assert load_backbone(tmp_path / "moved" / "models" / "best").fingerprint != start.fingerprint
    with pytest.raises(InputError, match=r"pretrain\.start = Backbone\(.*, now T5Config\("):
        other = dataclasses.replace(CONFIG, mlp_dim=64)
        pretrain(other, model_dir=tmp_path / "moved", tokenizer="package:nano", **settings)


def test_case_4_1_other_text_in_the_same_place_is_refused(corpus, start, tmp_path):
    settings = mixture(corpus) | {"schedule": TrainSchedule(train_steps=1, eval_period=1)}
    pretrain(start, model_dir=tmp_path / "run", **settings)
    before = (tmp_path / "run" / "models" / "best" / "model.safetensors").read_bytes()
    text = (corpus / "text.jsonl").read_text()
    (tmp_path / "text.jsonl").write_text(text.replace("mill", "hall", 1))
    named = r"other data: the hash of the running text = sha256:\w+, now sha256:\w+; choose"
    with pytest.raises(InputError, match=named):
        pretrain(start, model_dir=tmp_path / "run", **mixture(tmp_path))
    named = r"PrefixLM\.input_length \(of pretrain\.components\[1\]\) = 16, now 24;"
    longer = PrefixLM(0.25, batch_size=8, input_length=24, target_length=8)
    parts = [settings["components"][0], longer, settings["components"][2]]
    with pytest.raises(InputError, match=named):
        pretrain(start, model_dir=tmp_path / "run", **settings | {"components": parts})
    assert (tmp_path / "run" / "models" / "best" / "model.safetensors").read_bytes() == before


def test_a_phrasing_has_answers_of_its_own(corpus):
    [_, _, part] = mixture(corpus)["components"]
    tokenizer = load_tokenizer("package:nano")
    told = []
    for batches in part.make(tokenizer, None, seed=0, ids=T5_IDS):
        batch = batches.batch(0)
        pairs = zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
        told.append({tokenizer.decode(x).split(": ")[1]: tokenizer.decode(y) for x, y in pairs})
    both = set(told[0]) & set(told[1])
    assert both and all({told[0][text], told[1][text]} == {"yes", "no"} for text in both)


def test_what_it_needs_is_said(corpus, start, tmp_path):
    settings = mixture(corpus)
    with pytest.raises(InputError, match="needs a tokenizer"):
        pretrain(CONFIG, model_dir=tmp_path, **settings)
    with pytest.raises(InputError, match=r"set pretrain\.text"):
        pretrain(start, model_dir=tmp_path, **settings | {"text": None})
    rounded = load_backbone(start.name, dtype="bfloat16")
    with pytest.raises(InputError, match=r"set --gin\.ptjax\.load_backbone\.dtype=.*float32"):
        pretrain(rounded, model_dir=tmp_path, **settings)
    with pytest.raises(InputError, match=r"text.jsonl:1: no field 'body'"):
        wrong = TextFiles({"text.jsonl": "body"}, data_dir=str(corpus))
        pretrain(start, model_dir=tmp_path, **settings | {"text": wrong})
    for files, named in (({}, "{}"), ({"text.jsonl": "text"}, "text.jsonl")):
        with pytest.raises(InputError, match=f"no document in the running text of {named}"):
            none = TextFiles(files, data_dir=str(corpus), preprocess=lambda fields: [])
            pretrain(start, model_dir=tmp_path, **settings | {"text": none})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_gin_files_that_go_on_from_a_checkpoint(
    call, own_process, corpus, start, tmp_path, capsys
):
    code, _, err = call(
        "pretrain",
        "--gin_file=runs/lm_adapt.gin",
        f"--gin.INITIAL_CHECKPOINT_PATH='{start.name}'",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
        f"--gin.CORPUS_DIR='{corpus}'",
        "--gin.CORPUS_FILES={'text.jsonl': 'text'}",
        "--gin.BATCH_SIZE=8",
        "--gin.ptjax.PrefixLM.input_length=16",
        "--gin.ptjax.PrefixLM.target_length=8",
        "--gin.TRAIN_STEPS=2",
    )
    assert code == 0 and "step 2/2" in err, err
    assert (tmp_path / "run" / "models" / "best" / "model.safetensors").exists()
