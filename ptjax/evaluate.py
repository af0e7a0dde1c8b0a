"""`python -m ptjax.evaluate`: scores a prompt, or a backbone alone, on a split of a task."""

from __future__ import annotations

import json
from typing import Any

from ptjax import cli
from ptjax.cli import chosen
from ptjax.errors import InputError


def main() -> None:
    parser = cli.make_parser(
        "evaluate",
        """
        Scores a prompt on a split of the gin file's task and prints the metrics as JSON
        (fractions). Every example counts exactly once; logs go to stderr.

          python -m ptjax.evaluate --model_dir=runs/quickstart
          python -m ptjax.evaluate --gin_file=quickstart.gin --prompt=none --split=validation
        """,
        gin_help="It names task and backbone; --model_dir brings its own.",
    )
    chosen.add_flags(parser)
    parser.add_argument(
        "--split", metavar="NAME", help="a split of the task; default: test if it has one"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write inputs, targets and predictions as JSON lines"
    )
    arguments = cli.parse(parser)
    cli.run(lambda: evaluate(arguments))


def evaluate(arguments: Any) -> None:
    from ptjax import atomic, evaluation, prompting

    chosen.load(arguments)
    task = chosen.task()
    if task is None:
        raise InputError("which task? Name it with a --gin_file or --model_dir (see --help)")
    bound = cli.settings(chosen.TUNE, "evaluation").get("evaluation")
    settings = bound or evaluation.Evaluation()
    split = arguments.split or ("test" if "test" in task.splits else settings.split)
    prompt = chosen.load_prompt(arguments)
    metadata = {} if prompt is None else prompt.metadata
    loaded = chosen.load_backbone(arguments, metadata)
    if loaded.tokenizer is None:
        raise InputError(f"{loaded.name} has no tokenizer; set load_backbone.tokenizer")
    if prompt is not None:
        prompt = prompting.check_prompt(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    lengths = {"inputs": 512, "targets": 16} | chosen.lengths(metadata)
    evaluator = evaluation.Evaluator(
        task, loaded, loaded.tokenizer, lengths, settings, prompting.sees_input(prompt)
    )
    _, variables = prompting.prompted(loaded, prompt)
    predictions = evaluator.predict(variables, split)
    examples = evaluator.examples(split)
    metrics = evaluator.score(predictions, split)
    if arguments.output:
        rows = [
            example.fields
            | {"inputs": example.inputs, "targets": example.targets, "prediction": prediction}
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic.write_bytes(arguments.output, text.encode())
    result = {
        "task": task.name,
        "split": split,
        "examples": len(examples),
        "metric": evaluator.metric,
        "value": metrics[evaluator.metric],
        "metrics": metrics,
        "backbone": loaded.name,
        "prompt": chosen.prompt_path(arguments),
        "step": metadata.get("step"),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
