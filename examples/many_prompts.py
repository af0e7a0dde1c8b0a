"""Three prompts, one backbone, one batch in which each message has the prompt that it needs.

    python examples/many_prompts.py

It runs on a CPU with the backbone and the data that come with ptjax.
"""

import json
from importlib.resources import files

import ptjax

BACKBONE = "ptjax-nano"
STEPS = 150  # of each prompt
RUNS, PROMPTS = "runs/many_prompts", "prompts"
BATCH = (  # (message, prompt)
    ("The invoice was wrong again.", "tickets"),
    ("The invoice was wrong again.", "asks"),
    ("Which floor is the room on?", "tickets"),
    ("Which floor is the room on?", "asks"),
    ("A film to fall in love with.", "sentiment"),
    ("A film to fall asleep in.", "sentiment"),
)


def read(folder: str) -> dict[str, list[dict[str, str]]]:
    """The records of each split of data that come with ptjax."""
    place = files(ptjax) / "assets" / folder
    texts = {split: (place / f"{split}.jsonl").read_text() for split in ("train", "validation")}
    return {split: [json.loads(row) for row in text.splitlines()] for split, text in texts.items()}


def make_tasks() -> list[ptjax.Task]:
    """What a ticket is, whether it asks something, and whether a sentence is praise or blame."""
    tickets, sentences = read("tickets"), read("sentiment")
    asks = {
        split: [{**row, "asks": "no" if row["category"] != "question" else "yes"} for row in rows]
        for split, rows in tickets.items()
    }
    kinds = {"complaint": "negative", "praise": "positive", "question": "unknown"}
    return [
        ptjax.Task.from_records(
            tickets, inputs="{body}", label="category", verbalizer=kinds, name="tickets"
        ),
        ptjax.Task.from_records(asks, inputs="{body}", label="asks"),
        ptjax.Task.from_records(sentences, inputs="{text}", label="label", name="sentiment"),
    ]


def main() -> None:
    backbone = ptjax.load_backbone(BACKBONE)
    for task in make_tasks():
        run = ptjax.tune(backbone, task, f"{RUNS}/{task.name}", steps=STEPS)
        print(f"{task.name}: accuracy on validation {run.results['value']:.3f}")
        run.prompt.save(f"{PROMPTS}/{task.name}")

    prompts = ptjax.load_prompts(PROMPTS)  # by the names of the folders
    bank = ptjax.make_bank(prompts)
    messages, names = zip(*BATCH, strict=True)
    predictions = ptjax.predict(backbone, messages, bank, prompt_ids=names)
    for message, name, prediction in zip(messages, names, predictions, strict=True):
        probability = prediction.probabilities[prediction.text]
        print(f"{name:9}  {message:28}  {prediction.text} ({probability:.2f})")


if __name__ == "__main__":
    main()
