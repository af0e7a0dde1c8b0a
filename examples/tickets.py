"""From a table of tickets to a prompt that others can use, as a script.

    python examples/tickets.py

It runs on a CPU with the backbone and the tickets that come with ptjax. `quickstart.ipynb` explains
each step. For a table of your own, change the constants.
"""

import ptjax

BACKBONE = "ptjax-nano"  # or "google/t5-base-lm-adapt" from the Hugging Face hub, or a path
TICKETS = "package:tickets"  # or a folder of yours
INPUTS, LABEL = "{body}", "category"  # the template of the input, and the column with the label
# ptjax-nano was pre-trained with these answers; a released T5 needs none (None).
WORDS = {"complaint": "negative", "praise": "positive", "question": "unknown"}
STEPS = 200
MODEL_DIR = "runs/tickets"  # a second call resumes the run in it, or returns its results
SHARED = "tickets"
MESSAGES = (
    "The parcel came broken and nobody answers my letters.",
    "Thank you, the technician was wonderful.",
    "When does the shop in the station open?",
)


def main() -> None:
    backbone = ptjax.load_backbone(BACKBONE)
    train, validation, test = (f"{TICKETS}/{s}.jsonl" for s in ("train", "validation", "test"))
    task = ptjax.Task.from_records(
        train, validation, test, inputs=INPUTS, label=LABEL, verbalizer=WORDS, name="tickets"
    )
    run = ptjax.tune(backbone, task, MODEL_DIR, steps=STEPS)
    print(run.report())
    predictions = ptjax.predict(backbone, MESSAGES, run.prompt)
    for message, prediction in zip(MESSAGES, predictions, strict=True):
        print(message, prediction, sep="\n  ")
    run.prompt.save(SHARED)  # a folder with a model card
    # run.prompt.push_to_hub("me/tickets-prompt")


if __name__ == "__main__":
    main()
