"""PEFT's part in `methods_beside_peft.py`, in an environment that may have no JAX.

    python benchmarks/methods_peft_side.py FOLDER METHOD        takes turns (see turns.py)

FOLDER holds what `methods_beside_peft.py` wrote: `settings.json`, the recipe of the backbone,
`batches.npz`, and the folder METHOD, an adapter in PEFT's format.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import peft_side
import torch
import turns


def load_trainable(backbone: Any, folder: str) -> Any:
    """The backbone with the adapter in `folder`, which is trained on.

    For a prefix, `PeftModel.from_pretrained(is_trainable=True)` raises ValueError; PEFT's own
    functions for configs and weights load it all the same.
    """
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = peft.get_peft_model(backbone, config)
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(folder, device="cpu"))
    return model.train()


def start(folder: Path, method: str) -> turns.Side:
    """SGD steps from the adapter in `folder`; the first ones report their losses."""
    settings: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(settings["threads"])
    backbone = peft_side.make_backbone(folder, settings)
    model = load_trainable(backbone, str(folder / method))
    trained = peft_side.trainable(model)
    optimizer = torch.optim.SGD(trained, lr=settings["learning_rates"][method])
    stored = np.load(folder / "batches.npz")
    batches = [
        peft_side.to_batch(stored[f"{i}/inputs"], stored[f"{i}/targets"], settings["device"])
        for i in range(settings["batches"])
    ]

    def run(numbers: Iterable[int]) -> list[float]:
        losses = []
        for number in numbers:
            optimizer.zero_grad()
            loss = model(**batches[number % len(batches)]).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    count = sum(parameter.numel() for parameter in trained)
    return turns.training_side(run, len(batches), settings["checked_steps"], count)


if __name__ == "__main__":
    where, which = sys.argv[1:]
    turns.serve(lambda: start(Path(where), which))
