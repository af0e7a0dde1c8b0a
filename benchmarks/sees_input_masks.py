"""Two ways to make up for what a prompt loses that does not see its input: neither does.

    python benchmarks/sees_input_masks.py --data_dir=DIR --corpus_dir=DIR --output_dir=DIR

To be started at the top of the clone. Both are masks (`masks.py`) on ptjax-nano, tried on SST-2 by
the recipe of `sees_input.py`. In the first the prompt sees its input in the upper half of the
encoder's layers alone. In the second the backbone gets used to prompts that do not see: 600 steps
more of its own pre-training, in which the names of tasks and the starts of running texts do not see
what follows; as many steps without that mask are the control. Every run is a command of its own,
printed before it starts; one that finished is not run again, one that was stopped goes on.
CORPUS_DIR holds the running text that `runs/pretrain_nano.gin` names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import masks
import numpy as np
import runs
import sees_input

from ptjax.backbones.load import load_backbone
from ptjax.models.prompted import with_prompt

NANO = "ptjax-nano"
ADAPTATIONS: dict[str, list[str]] = {  # gin files behind runs/pretrain_nano_from.gin
    "adapted_without_mask": [],
    "adapted_with_mask": ["benchmarks/masks_names.gin"],
}


def check_masks() -> None:
    """In all layers the masks, a prompt's and a name's, equal `sees_input = False`.

    The prompt is the name's own embeddings.
    """
    backbone = load_backbone(NANO, dtype="float32")
    assert backbone.tokenizer is not None
    name, text = map(backbone.tokenizer.encode, ("sentiment:", "there is no dull moment in it"))
    embedding = backbone.variables["params"]["token_embedder"]["embedding"]
    prompted = with_prompt(backbone.variables, embedding[jnp.array(name)])
    alone, both, targets = (jnp.array([row]) for row in (text, name + text, [0, *text]))
    whole, longer = ({"encoder_lengths": jnp.array([x.shape[1]])} for x in (alone, both))
    want = backbone.make_apply_fn(attends_to_input=False)(prompted, alone, targets, **whole)
    layers = range(backbone.config.num_encoder_layers)
    blind = masks.hide_from_prompt(backbone, len(name), layers)
    for found in (
        blind.apply_fn(prompted, alone, targets, **whole),
        masks.names(backbone).apply_fn(backbone.variables, both, targets, **longer),
    ):
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    seeing = backbone.apply_fn(prompted, alone, targets, **whole)
    assert not np.allclose(seeing, want, rtol=1e-2, atol=1e-2), "the mask makes no difference"


def adapt(flags: argparse.Namespace, name: str) -> str:
    """Path of ptjax-nano after some more steps of its pre-training."""
    settings = {
        "INITIAL_CHECKPOINT_PATH": NANO,
        "DATA_DIR": flags.data_dir,
        "CORPUS_DIR": flags.corpus_dir,
        "EVAL_PERIOD": 100,
        "LEARNING_RATE": 0.005,
        "RANDOM_SEED": 3,
    }
    model_dir = flags.output_dir / name / f"pretrained_{flags.adapt_steps}"
    files = ["runs/pretrain_nano_from.gin", *ADAPTATIONS[name]]
    return os.path.abspath(runs.pretrain(model_dir, files, settings, flags.adapt_steps))


def tune(
    flags: argparse.Namespace, name: str, backbone: str, sees: bool, gin_files: Sequence[str] = ()
) -> str:
    """Test accuracy on SST-2, as cells."""
    own = vars(flags) | {"backbone": backbone, "output_dir": flags.output_dir / name}
    found = sees_input.train(argparse.Namespace(**own), "sst2", sees, flags.steps, gin_files)
    return runs.show(found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, type=os.path.abspath)
    parser.add_argument("--corpus_dir", required=True, type=os.path.abspath)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=sees_input.STEPS, help="of prompt tuning")
    parser.add_argument("--adapt_steps", type=int, default=600, help="of pre-training")
    flags = parser.parse_args()
    check_masks()
    files = ["benchmarks/masks_lower_half.gin"]
    rows = [("as shipped", "upper half", tune(flags, "lower_half", NANO, True, files))]
    for name in ADAPTATIONS:
        backbone = adapt(flags, name)
        for sees in (True, False):
            cells = tune(flags, name, backbone, sees)
            rows.append((name.replace("_", " "), "all" if sees else "none", cells))
    print("\n| SST-2, backbone | the prompt sees in | mean | std | seeds |")
    print("|---|---|--:|--:|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
