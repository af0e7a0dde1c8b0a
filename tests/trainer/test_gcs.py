"""Every path may be gs://: weights in, prompts and whole runs out, on a storage emulator.

The emulator (gcp-storage-emulator) keeps its objects in memory. gcsfs, behind `etils.epath`, and
tensorstore, behind the T5X readers and Orbax, find it through the environment.
"""

from __future__ import annotations

import http.server
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import gcsfs
import numpy as np
import pytest
from conftest import FIXTURES, outcome, stopped_by_sigterm
from etils import epath
from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from tensorboardX import record_writer
from tiny import save_tiny, tiny_config

from ptjax import files
from ptjax.backbones.load import Backbone, load_backbone
from ptjax.backbones.save import save_backbone
from ptjax.data.batching import Batching
from ptjax.data.tasks import Task
from ptjax.data.tokenizer import load_tokenizer
from ptjax.errors import InputError, TrainingError
from ptjax.interop.peft import export_peft
from ptjax.interop.prompt_file import load_prompt, load_prompts, save_prompt
from ptjax.methods.prompt_tuning import PromptTuning
from ptjax.settings import Evaluation, RunSettings, TrainSchedule
from ptjax.trainer import lock
from ptjax.trainer import tune as tuning
from ptjax.trainer.callbacks import Callback
from ptjax.trainer.config_file import ConfigFile
from ptjax.training.optimizer import Adafactor
from ptjax.trees import flatten_paths

# tensorboardX uploads a closed file once more when Python exits; the emulator is gone by then.
record_writer.GCSRecordWriter.__del__ = lambda self: None


class PatientServer(http.server.HTTPServer):
    """One request at a time, as the emulator's storage wants it; the others wait, all of them."""

    request_queue_size = 256

    def handle_error(self, request, client_address) -> None:
        """A client that has read enough hangs up: no reason for a traceback."""


def list_range(request, response, storage, *args, **kwargs) -> None:
    """The emulator's listing, with `startOffset` and `endOffset`, by which tensorstore lists."""
    start, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
    send = response.json

    def send_range(listing):
        items = [x for x in listing["items"] if start <= x["name"] and (not end or x["name"] < end)]
        send({**listing, "items": items})

    response.json = send_range
    objects.ls(request, response, storage, *args, **kwargs)


def with_generation(read):
    """The emulator's `read`, with the generation in a header, where tensorstore looks for it."""

    def reading(request, response, storage, *args, **kwargs) -> None:
        read(request, response, storage, *args, **kwargs)
        if current := generation(request.params["object_id"], request, storage):
            response["x-goog-generation"] = current

    return reading


def generation(name: str, request, storage) -> str:
    try:
        return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
    except NotFound:
        return ""


def on_condition(change):
    """The emulator's `change`, if the object has the generation that tensorstore asks for.

    google-cloud-storage, which uploads in parts, is told another one than the emulator keeps.
    """

    def changed(request, response, storage, *args, **kwargs) -> None:
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        wanted = request.query.get("ifGenerationMatch", [None])[0]
        ours = wanted is not None and request.query.get("uploadType") != ["multipart"]
        if ours and wanted != (generation(name, request, storage) or "0"):
            response.status = http.HTTPStatus.PRECONDITION_FAILED
            return
        change(request, response, storage, *args, **kwargs)

    return changed


AS_GOOGLE_HAS_IT = {
    objects.ls: list_range,
    objects.download: with_generation(objects.download),
    objects.get: with_generation(objects.get),
    objects.insert: on_condition(objects.insert),
    objects.delete: on_condition(objects.delete),
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[epath.Path]:
    """An empty bucket, gs://bucket."""
    with pytest.MonkeyPatch.context() as patch:
        handlers = [
            (path, {method: AS_GOOGLE_HAS_IT.get(f, f) for method, f in methods.items()})
            for path, methods in emulator.HANDLERS
        ]
        patch.setattr(emulator, "HANDLERS", tuple(handlers))
        patch.setattr(emulator.server, "HTTPServer", PatientServer)
        with emulator.create_server(
            "localhost", 0, in_memory=True, default_bucket="bucket"
        ) as made:
            address = f"http://localhost:{made._api._httpd.server_address[1]}"
            patch.setenv("STORAGE_EMULATOR_HOST", address)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "nobody checks it")
            patch.setenv("GOOGLE_CLOUD_PROJECT", "test")
            patch.setenv("NO_GCE_CHECK", "true")  # no credentials are looked for on the network
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            gcsfs.GCSFileSystem.clear_instance_cache()
            yield epath.Path("gs://bucket")
            gcsfs.GCSFileSystem.clear_instance_cache()


@pytest.fixture
def folder(bucket, request) -> epath.Path:
    """A folder of this test alone."""
    return bucket / request.node.name.replace("[", "-").replace("]", "")


def upload(source: Path, target: epath.Path) -> epath.Path:
    """A local folder as `target`, all files at once."""
    gcsfs.GCSFileSystem().put(f"{source}/", f"{target}/", recursive=True)
    return target


def assert_same_weights(one: Backbone, other: Backbone) -> None:
    assert one.fingerprint == other.fingerprint
    theirs = flatten_paths(other.variables)
    for path, value in flatten_paths(one.variables).items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)


# Weights in


def test_an_orbax_checkpoint(folder, t5_1_1):
    upload(FIXTURES / "t5_1_1_tiny_orbax" / "checkpoint_3", folder / "checkpoint_3")
    assert_same_weights(load_backbone(folder), t5_1_1)


def test_a_legacy_checkpoint_whole_and_with_a_chunk_missing(folder, t5_1_1):
    checkpoint = upload(FIXTURES / "t5_1_1_tiny_legacy" / "checkpoint_3", folder / "checkpoint_3")
    loaded = load_backbone(folder)
    assert loaded.name == os.fspath(checkpoint)
    assert_same_weights(loaded, t5_1_1)
    chunk = checkpoint / "target.encoder.layers_1.mlp.wo.kernel" / "0.0"
    chunk.unlink()
    with pytest.raises(InputError, match=f"{chunk}: a chunk of parameter .* is missing"):
        load_backbone(checkpoint)


def test_a_hugging_face_directory_out_and_in(folder, t5_1_1):
    tokenizer = load_tokenizer("byt5")
    params = t5_1_1.variables["params"]
    save_backbone(folder, t5_1_1.config, params, dtype="float32", max_shard_bytes=60_000)
    tokenizer.save(folder)
    with pytest.raises(InputError, match="384 ids do not fit"):  # so it was found
        load_backbone(folder)
    (folder / "tokenizer_config.json").unlink()
    assert_same_weights(load_backbone(folder), t5_1_1)


def test_nothing_there(bucket):
    with pytest.raises(
        InputError, match="no backbone at gs://bucket/none: the path does not exist"
    ):
        load_backbone("gs://bucket/none")


# Files


def test_prompts_out_and_in(folder):
    prompt = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    save_prompt(folder / "best.safetensors", prompt, {"step": 3})
    loaded = load_prompt(folder / "best.safetensors")
    np.testing.assert_array_equal(loaded.prompt, prompt)
    assert loaded.metadata == {"step": 3}
    for changed in (prompt + 1, prompt):  # the second replaces the first
        export_peft(folder / "ours", changed, num_heads=2, num_layers=1, metadata={"step": 3})
        np.testing.assert_array_equal(load_prompt(folder / "ours").prompt, changed)
    assert load_prompt(folder / "ours").metadata == {"step": 3}
    local = FIXTURES / "peft" / "prompt_tuning"
    np.testing.assert_array_equal(
        load_prompt(upload(local, folder / "peft")).prompt, load_prompt(local).prompt
    )
    np.testing.assert_array_equal(load_prompt(folder).prompt, prompt)  # its best.safetensors
    save_prompt(folder / "seed" / "best.safetensors", prompt - 1, {})
    found = load_prompts(folder)
    assert list(found) == ["best", "ours", "peft", "seed"]
    np.testing.assert_array_equal(found["seed"].prompt, prompt - 1)
    export_peft(folder / "outer" / "inner", prompt, num_heads=2, num_layers=1, metadata={})
    with pytest.raises(InputError, match=f"did you mean {folder}/outer/inner"):
        load_prompt(folder / "outer")


def test_a_file_is_whole_or_the_one_before(folder):
    file = folder / "results.json"
    files.write_bytes(file, b"the first")
    files.write_bytes(file, b"the second")
    with pytest.raises(KeyError), files.written_whole(file) as stream:
        stream.write(b"half of the th")
        raise KeyError
    assert file.read_bytes() == b"the second"
    assert [path.name for path in folder.iterdir()] == ["results.json"]


def test_case_5_3_a_lock_is_one_runs_by_generation(folder, monkeypatch, caplog):
    """Taken, refused, taken over when it is silent, noticed by the one that lost it, removed."""
    lost, other = lock.Lock(folder), lock.Lock(folder)
    assert lost.try_once()
    with pytest.raises(InputError, match=rf"{folder}: in use by process {os.getpid()} on "):
        other.try_once()
    held = json.loads((folder / "run.lock").read_text())
    elsewhere = held | {"host": "spot-7", "machine": "other", "token": "t"}
    (folder / "run.lock").write_text(json.dumps(elsewhere))
    monkeypatch.setattr(lock, "SILENCE", 0.2)
    monkeypatch.setattr(lock, "POLL", 0.1)
    with caplog.at_level(logging.INFO, logger="absl"), lock.hold(folder) as winner:
        assert sum("taking over the lock" in line for line in caplog.messages) == 1
        monkeypatch.setattr(lock, "HEARTBEAT", 0.0)
        assert winner is not None
        winner.check()
        with pytest.raises(TrainingError, match=rf"taken over by process {os.getpid()} on "):
            lost.check()
        lost.release()
        monkeypatch.setattr(lock, "HEARTBEAT", 30.0)
        with pytest.raises(InputError, match="in use"):  # it was not the loser's to remove
            other.try_once()
    assert other.try_once()
    other.release()


# A run


@pytest.fixture(scope="module")
def tiny_backbone(bucket) -> Backbone:
    """Read from gs:// as well."""
    tokenizer = load_tokenizer("package:nano")
    return load_backbone(
        save_tiny(bucket / "backbone", tiny_config(8192, emb_dim=8), tokenizer=tokenizer)
    )


@pytest.fixture(scope="module")
def task(bucket) -> Task:
    """16 training and 8 validation sentences on gs://."""
    directory = bucket / "task"
    for split, count in {"train": 16, "validation": 8}.items():
        rows = [
            json.dumps({"text": ("a warm film", "a dull film")[i % 2], "label": i % 2})
            for i in range(count)
        ]
        files.write_bytes(directory / f"{split}.jsonl", "\n".join(rows).encode())
    return Task(
        name="words",
        data_dir=os.fspath(directory),
        splits={split: f"{split}.jsonl" for split in ("train", "validation")},
        inputs="{text}",
        label="label",
        verbalizer={"0": "good", "1": "bad"},
    )


def tune(
    model_dir: epath.Path | Path,
    task: Task,
    backbone: Backbone,
    callbacks: Sequence[Callback] = (),
) -> None:
    settings = RunSettings(
        method=PromptTuning(length=3),
        optimizer=Adafactor(learning_rate=0.05, learning_rate_scale="embedding_rms"),
        schedule=TrainSchedule(train_steps=4, eval_period=2, log_period=1, keep=1),
        batching=Batching(batch_size=8, feature_lengths={"inputs": 8, "targets": 4}),
        evaluation=Evaluation(batch_size=8),
    )
    callbacks = [ConfigFile("SEED = 0"), *callbacks]
    tuning.tune(backbone, task, model_dir, settings, callbacks=callbacks)


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(folder, task, tiny_backbone, tmp_path, caplog):
    """And leaves what one on a local disk leaves that was never stopped.

    The checkpoint that it saved when it was stopped lacks the marker that is written last, as if a
    kill had been faster; so it is passed over for the one before.
    """
    tune(tmp_path, task, tiny_backbone)
    assert (
        stopped_by_sigterm(3, lambda callbacks: tune(folder, task, tiny_backbone, callbacks)) == 143
    )
    assert not (folder / "results.json").exists()
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert saved == {"2", "3"}
    (folder / "checkpoints" / "3" / "commit_success.txt").unlink()
    with caplog.at_level(logging.INFO, logger="absl"):
        tune(folder, task, tiny_backbone)
    assert f"resuming from step 2 of {folder}" in caplog.messages
    assert outcome(folder) == outcome(tmp_path)
    assert (folder / "config.gin").read_text() == (tmp_path / "config.gin").read_text()
    assert any((folder / "tensorboard").iterdir())
