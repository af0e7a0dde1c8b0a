"""Tunes a prompt for SST-2 with ptjax, and saves it.

python with_ptjax.py BACKBONE TRAIN.tsv VALIDATION.tsv TEST.tsv OUTPUT STEPS
"""

import sys

import ptjax

name, train, validation, test, output, steps = sys.argv[1:]
backbone = ptjax.load_backbone(name)
splits = {"train": train, "validation": validation, "test": test}
words = {"0": "negative", "1": "positive"}
task = ptjax.Task.from_records(splits, inputs="{sentence}", label="label", verbalizer=words)
run = ptjax.tune(backbone, task, output, steps=int(steps))
print(run.report())
run.prompt.save(f"{output}/prompt")
