"""Tunes a prompt for SST-2 with Hugging Face PEFT, in the steps of its own guide, and saves it.

python with_peft.py BACKBONE TRAIN.tsv VALIDATION.tsv TEST.tsv OUTPUT EPOCHS RATE
"""

import csv
import json  # for the benchmark
import sys

import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, get_linear_schedule_with_warmup

backbone, train_file, validation_file, test_file, output, epochs, rate = sys.argv[1:]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(backbone)
labels = {"0": "negative", "1": "positive"}
last = {}  # for the benchmark


def read(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))


def collate(rows):
    texts = [row["sentence"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    targets = [labels[row["label"]] for row in rows]
    targets = tokenizer(targets, padding=True, return_tensors="pt").input_ids
    batch["labels"] = targets.masked_fill(targets == tokenizer.pad_token_id, -100)
    return batch


def score(rows):
    answers = []
    model.eval()
    for batch in DataLoader(rows, batch_size=32, collate_fn=collate):
        batch.pop("labels")
        with torch.no_grad():
            generated = model.generate(**batch, max_new_tokens=8)
        answers += tokenizer.batch_decode(generated, skip_special_tokens=True)
    model.train()
    expected, answers = [labels[row["label"]] for row in rows], [a.strip() for a in answers]
    last["answers"] = (expected, answers)  # for the benchmark
    return f1_score(expected, answers, labels=[*labels.values()], average="macro")


train, validation, test = map(read, (train_file, validation_file, test_file))
config = PromptTuningConfig(
    task_type=TaskType.SEQ_2_SEQ_LM,
    prompt_tuning_init=PromptTuningInit.TEXT,
    prompt_tuning_init_text="Is the sentiment of the sentence positive or negative?",
    num_virtual_tokens=20,
    num_transformer_submodules=1,
    tokenizer_name_or_path=backbone,
)
network = AutoModelForSeq2SeqLM.from_pretrained(backbone, dtype="float32")
model = get_peft_model(network, config)
model.print_trainable_parameters()
loader = DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=float(rate))
schedule = get_linear_schedule_with_warmup(optimizer, 0, len(loader) * int(epochs))
best = -1.0
for epoch in range(int(epochs)):
    total = 0.0
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
    value = score(validation)
    print(f"epoch {epoch}: loss {total / len(loader):.4f}, validation F1 {value:.3f}")
    if value > best:
        best = value
        model.save_pretrained(output)
model.load_adapter(output, "best")
model.set_adapter("best")
print(f"test F1 {score(test):.4f}")
with open(f"{output}/answers.json", "w") as stream:  # for the benchmark
    json.dump(last["answers"], stream)  # for the benchmark
