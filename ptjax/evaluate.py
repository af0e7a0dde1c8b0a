"""`python -m ptjax.evaluate`: scores a prompt, a hard prompt or a backbone alone on a split."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.cli.gin_files import left_out
from ptjax.errors import InputError
from ptjax.files import JsonObject, Metadata

if TYPE_CHECKING:
    from ptjax.data.examples import Example, Examples
    from ptjax.data.hard_prompt import HardPrompt
    from ptjax.data.tasks import Task
    from ptjax.evaluation.evaluator import Evaluator
    from ptjax.inference.bank import PromptBank
    from ptjax.interop.prompt_file import PromptFile


def main() -> None:
    """Parses the flags and runs the command."""
    parser = cli.make_parser(
        "evaluate",
        """
        Scores a prompt on a split of the gin file's task and prints the metrics as JSON
        (fractions). Every example counts exactly once; logs go to stderr.

        With --prompts=DIR, scores every prompt of one task and their ensemble, N prompts in one
        forward pass: "members", their "average", the "best" (chosen on the split that is scored,
        which flatters it) and the "ensemble": a majority vote (the mean likelihood breaks ties)
        and, where labels are ranked, the mean of the labels' probabilities.

        With --hard_prompt=TEXT, scores the backbone alone with the text in front of every input,
        as a baseline for a tuned prompt.

          python -m ptjax.evaluate --model_dir=runs/quickstart
          python -m ptjax.evaluate --gin_file=quickstart.gin --prompts=runs/seeds/prompts
          python -m ptjax.evaluate --model_dir=runs/seeds
          python -m ptjax.evaluate --gin_file=quickstart.gin --prompt=none --split=validation
          python -m ptjax.evaluate --gin_file=quickstart.gin --hard_prompt='Good or bad?' --shots=4
        """,
        gin_help="It names task and backbone; --model_dir brings its own.",
    )
    model_flags.add_flags(
        parser,
        "score every prompt in DIR (files, PEFT directories, folders with a best.safetensors) and "
        "their ensemble",
    )
    hard = parser.add_argument_group("a hard prompt instead")
    hard.add_argument(
        "--hard_prompt",
        metavar="TEXT",
        help="prefix of every input; or it surrounds the input where it contains {inputs}",
    )
    hard.add_argument(
        "--shots",
        type=int,
        default=0,
        metavar="N",
        help="training examples in front of it, drawn with RANDOM_SEED; default: 0",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="a split of the task; default: test if it has one"
    )
    output.add_flags(parser, "write inputs, targets and predictions as JSON lines")
    output.add_prefix_flag(parser)
    distributed.add_flags(parser)
    arguments = cli.parse(parser)
    cli.run(lambda: evaluate(arguments), arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    """Scores a prompt, a bank of prompts, a hard prompt or the backbone alone on a split.

    Prints the scores as JSON. With --output, also writes the prediction for each example.

    Args:
        arguments: the parsed flags, which choose what to score.
    """
    from ptjax.data.batching import FEATURE_LENGTHS
    from ptjax.evaluation.evaluator import Evaluator
    from ptjax.inference import prompts
    from ptjax.inference.bank import PromptBank
    from ptjax.inference.generate import tokenizer_of
    from ptjax.settings import RunSettings
    from ptjax.sharding import processes

    if arguments.output:
        output.check(arguments.output, force=arguments.force, inputs=model_flags.inputs(arguments))
    hard_prompt = read_hard_prompt(arguments)
    model_flags.load(arguments, reads_data=True)
    if arguments.prompt is None and arguments.prompts is None:
        arguments.prompts = model_flags.trained_bank(arguments)
    many = arguments.prompts is not None
    prompt = model_flags.load_bank(arguments) if many else model_flags.load_prompt(arguments)
    metadata = metadata_of(prompt)
    task = model_flags.task(metadata)
    if task is None:
        raise no_task(metadata)
    settings = RunSettings(**cli.settings(model_flags.SETTINGS, "evaluation", "seed"))
    loaded = model_flags.load_backbone(arguments, metadata)
    tokenizer = tokenizer_of(loaded)
    prompt = prompts.open_prompt(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    lengths = {**FEATURE_LENGTHS, **model_flags.lengths(metadata)}
    attends = isinstance(prompt, PromptBank) or prompt is None or prompt.attends_to_input
    evaluator = Evaluator(task, loaded, tokenizer, lengths, settings.evaluation, attends)
    split = arguments.split or evaluator.reported_split
    examples = evaluator.examples(split)
    if arguments.output:
        check_output(arguments, examples, many=many)
    if isinstance(prompt, PromptBank):
        scores, predictions = evaluate_bank(evaluator, prompt, split)
    else:
        rewording = rewording_of(hard_prompt, task, settings.seed)
        scores, predictions = evaluate_prompt(evaluator, prompt, split, rewording)
    if not processes.first():
        return
    if arguments.output:
        rows = [
            example.fields | added(example, of_example, arguments.prefix)
            for example, of_example in zip(examples, predictions, strict=True)
        ]
        lines = [output.as_json(row, ensure_ascii=False) + "\n" for row in rows]
        output.write(arguments.output, "".join(lines))
    described = {
        "task": task.name,
        "split": split,
        "examples": len(examples),
        "metric": evaluator.metric,
        **({} if task.positive is None else {"positive_label": task.positive}),
    }
    if many:
        source = {"backbone": loaded.name, "prompts": arguments.prompts}
    else:
        source = {"backbone": loaded.name, "prompt": model_flags.prompt_path(arguments)}
        source["step"] = metadata.get("step")
        if hard_prompt is not None:
            source |= {"hard_prompt": hard_prompt.text, "shots": hard_prompt.shots}
    output.show(output.as_json(described | scores | source, indent=2))


def no_task(metadata: Metadata) -> InputError:
    """The error if nothing names the task; the prompt's metadata may say why."""
    from ptjax.data.memory import not_in_a_file

    described = metadata.get("task")
    if isinstance(described, dict) and described.get("in_memory"):
        return not_in_a_file(str(described.get("name")))
    if reason := left_out("ptjax.tune.task"):
        return InputError(f"{reason}; evaluate there, or name a --gin_file with the task")
    return InputError("which task? Name it with a --gin_file or --model_dir (see --help)")


def metadata_of(prompt: PromptFile | PromptBank | None) -> JsonObject:
    """Returns a prompt's metadata, a bank's `shared_metadata`, or {} without a prompt."""
    from ptjax.inference.bank import PromptBank

    if prompt is None:
        return {}
    return shared_metadata(prompt) if isinstance(prompt, PromptBank) else prompt.metadata


def added(example: Example, predictions: JsonObject, prefix: str) -> JsonObject:
    """Returns the fields that --output adds to an example's record: input, target and predictions.

    Args:
        predictions: the fields with predictions, by name.
        prefix: prepended to the names of all added fields.
    """
    new = {"inputs": example.inputs, "targets": example.targets} | predictions
    return {f"{prefix}{name}": value for name, value in new.items()}


def check_output(arguments: argparse.Namespace, examples: Examples, *, many: bool) -> None:
    """Checks, before anything is scored, that --output can be written without loss of data.

    Args:
        arguments: the parsed flags.
        examples: the examples of the split.
        many: whether a bank of prompts is scored; its predictions are other fields than those of a
            single prompt.

    Raises:
        InputError: --output is a data file of the split, exists (without --force) or cannot be
            written, or a field of a record would be replaced by a new one.
    """
    files = dict.fromkeys(example.file for example in examples)
    output.check(arguments.output, force=arguments.force, inputs=files)
    names = ("predictions", "majority_vote", "mean_likelihood") if many else ("prediction",)
    for example in examples:
        new = added(example, dict.fromkeys(names), arguments.prefix)
        output.check_fields(example.fields, new, f"{example.file}:{example.line}")


def read_hard_prompt(arguments: argparse.Namespace) -> HardPrompt | None:
    """Makes the hard prompt (fixed text that is added to every input) that the flags describe.

    Returns None if --hard_prompt is not set. Otherwise sets `arguments.prompt` to "none", so that
    the backbone is scored without a tuned prompt.

    Raises:
        InputError: --hard_prompt is combined with --prompt or --prompts, --shots is negative, or
            it is set without --hard_prompt.
    """
    from ptjax.data.hard_prompt import HardPrompt

    if arguments.hard_prompt is None:
        if arguments.shots:
            raise InputError("--shots belongs to a hard prompt: add --hard_prompt=TEXT")
        return None
    for flag, value in (("--prompt", arguments.prompt), ("--prompts", arguments.prompts)):
        if value is not None:
            raise InputError(f"--hard_prompt and {flag} are mutually exclusive")
    arguments.prompt = "none"
    return HardPrompt(arguments.hard_prompt, arguments.shots)


def rewording_of(
    hard_prompt: HardPrompt | None, task: Task, seed: int
) -> Callable[[str], str] | None:
    """Returns a function that adds the hard prompt and its shots to the text of an input.

    Returns None without a hard prompt. Shots are training examples, with their targets, that
    come before the input.

    Args:
        task: the task; its split "train" is loaded if the hard prompt has shots.
        seed: determines which training examples are the shots.
    """
    if hard_prompt is None:
        return None
    return hard_prompt.rewording(task.load("train") if hard_prompt.shots else (), seed)


def evaluate_prompt(
    evaluator: Evaluator,
    prompt: PromptFile | None,
    split: str,
    rewording: Callable[[str], str] | None = None,
) -> tuple[JsonObject, list[JsonObject]]:
    """Scores a prompt, or the backbone alone, on a split.

    If a run has several processes, all of them must call it.

    Args:
        prompt: None for the backbone alone.
        rewording: adds a hard prompt to the text of an input; None leaves inputs unchanged.

    Returns:
        (scores, a row {"prediction": text} for each example). In the scores, "metrics" maps the
        names of metrics to values, and "value" is the value of `evaluator.metric`.
    """
    from ptjax.inference.model import bind

    variables = bind(evaluator.backbone, prompt, evaluator.apply_fn).variables
    predictions = evaluator.predict(variables, split, rewording)
    metrics = evaluator.score(predictions, split)
    scores = {"value": metrics[evaluator.metric], "metrics": metrics}
    return scores, [{"prediction": prediction} for prediction in predictions]


def evaluate_bank(
    evaluator: Evaluator, bank: PromptBank, split: str
) -> tuple[JsonObject, list[JsonObject]]:
    """Scores each prompt of a bank, and the ensembles of all, on a split.

    Returns:
        (scores, rows). The scores are the result of `Evaluator.score_ensemble`. There is a row for
        each example: "predictions" maps each prompt's name to its text, "majority_vote" and (only
        if labels are ranked) "mean_likelihood" are the texts that the ensembles predict.
    """
    predictions = evaluator.predict_bank(bank, split)
    together = {"majority_vote": predictions.majority_vote}
    if predictions.mean_likelihood is not None:
        together["mean_likelihood"] = predictions.mean_likelihood
    rows = [
        {"predictions": dict(zip(bank.names, members, strict=True))}
        | {way: texts[i] for way, texts in together.items()}
        for i, members in enumerate(zip(*predictions.members, strict=True))
    ]
    return evaluator.score_ensemble(predictions, split, bank.names), rows


def shared_metadata(bank: PromptBank) -> JsonObject:
    """Returns the metadata that all prompts of a bank agree on.

    The keys are "task" (only its name), "input_length", "target_length" and "backbone_name". The
    last is the first prompt's and is not compared. For the others, a prompt that does not record
    the key is ignored; a key that no prompt records is left out.

    Raises:
        InputError: two prompts were tuned for different tasks or lengths; the message names both.
    """
    shared: JsonObject = {}
    first: dict[str, str] = {}
    for name, of_prompt in zip(bank.names, bank.metadata, strict=True):
        metadata = of_prompt or {}
        task = metadata.get("task")
        shared.setdefault("backbone_name", metadata.get("backbone_name"))
        for key, value in (
            ("task", task.get("name") if isinstance(task, dict) else None),
            ("input_length", metadata.get("input_length")),
            ("target_length", metadata.get("target_length")),
        ):
            if value is None:
                continue
            if shared.setdefault(key, value) != value:
                raise InputError(
                    f"prompt {name!r} has the {key.replace('_', ' ')} {value!r}, prompt "
                    f"{first[key]!r} {shared[key]!r}; prompts are scored together only on one "
                    "task with the same lengths; move one to another directory"
                )
            first.setdefault(key, name)
    return shared


if __name__ == "__main__":
    main()
