"""`python -m ptjax.evaluate`: scores a prompt, a hard prompt or a backbone alone on a split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.errors import InputError

if TYPE_CHECKING:
    from ptjax.data.hard_prompt import HardPrompt


def main() -> None:
    parser = cli.make_parser(
        "evaluate",
        """
        Scores a prompt on a split of the gin file's task and prints the metrics as JSON
        (fractions). Every example counts exactly once; logs go to stderr.

        With --prompts=DIR, scores every prompt of one task and what all of them say together, N
        prompts in one forward pass: "members", their "average", the "best" (chosen on the split
        that is scored, which flatters it) and the "ensemble": a majority vote (the mean likelihood
        breaks ties) and, where labels are ranked, the mean of the labels' probabilities.

        With --hard_prompt=TEXT, scores the backbone alone with the text in front of every input,
        to compare a tuned prompt with.

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
        help="put in front of the inputs, or around them where it says {inputs}",
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


def evaluate(arguments: Any) -> None:
    from ptjax.data.batching import FEATURE_LENGTHS
    from ptjax.data.vocabularies import missing_tokenizer
    from ptjax.evaluation import evaluator
    from ptjax.inference import prompts
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
    metadata = shared_metadata(prompt) if many else {} if prompt is None else prompt.metadata
    task = model_flags.task(metadata)
    if task is None:
        raise InputError("which task? Name it with a --gin_file or --model_dir (see --help)")
    settings = RunSettings(**cli.settings(model_flags.SETTINGS, "evaluation", "seed"))
    loaded = model_flags.load_backbone(arguments, metadata)
    if loaded.tokenizer is None:
        raise missing_tokenizer(loaded.name, loaded.config.vocab_size)
    if prompt is not None:
        check = prompts.check_bank if many else prompts.check_prompt
        prompt = check(loaded, prompt, allow_mismatch=arguments.allow_mismatch)
    evaluator = evaluator.Evaluator(
        task,
        loaded,
        loaded.tokenizer,
        {**FEATURE_LENGTHS, **model_flags.lengths(metadata)},
        settings.evaluation,
        prompts.attends_to_input(prompt),
    )
    split = arguments.split or evaluator.reported_split
    examples = evaluator.examples(split)
    if arguments.output:
        check_output(arguments, examples, many=many)
    if many:
        scores, said = of_many(evaluator, prompt, split)
    else:
        rewording = rewording_of(hard_prompt, task, settings.seed)
        scores, said = of_one(evaluator, prompt, split, rewording)
    if not processes.first():
        return
    if arguments.output:
        rows = [
            example.fields | added(example, one, arguments.prefix)
            for example, one in zip(examples, said, strict=True)
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


def added(example: Any, answers: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The fields that an example's row of --output has besides its own."""
    new = {"inputs": example.inputs, "targets": example.targets} | answers
    return {f"{prefix}{name}": value for name, value in new.items()}


def check_output(arguments: Any, examples: Any, *, many: bool) -> None:
    """Before anything is scored: --output is no file of the split, and replaces no field."""
    files = dict.fromkeys(example.file for example in examples)
    output.check(arguments.output, force=arguments.force, inputs=files)
    names = ("predictions", "majority_vote", "mean_likelihood") if many else ("prediction",)
    for example in examples:
        new = added(example, dict.fromkeys(names), arguments.prefix)
        output.check_fields(example.fields, new, f"{example.file}:{example.line}")


def read_hard_prompt(arguments: Any) -> HardPrompt | None:
    """The hard prompt of the flags, which then name no other prompt."""
    from ptjax.data.hard_prompt import HardPrompt

    if arguments.hard_prompt is None:
        if arguments.shots:
            raise InputError("--shots are of a hard prompt: add --hard_prompt=TEXT")
        return None
    for flag, value in (("--prompt", arguments.prompt), ("--prompts", arguments.prompts)):
        if value is not None:
            raise InputError(f"--hard_prompt and {flag} are mutually exclusive")
    arguments.prompt = "none"
    return HardPrompt(arguments.hard_prompt, arguments.shots)


def rewording_of(
    hard_prompt: HardPrompt | None, task: Any, seed: int
) -> Callable[[str], str] | None:
    """Inputs -> what the backbone reads; None without a hard prompt."""
    if hard_prompt is None:
        return None
    return hard_prompt.rewording(task.load("train") if hard_prompt.shots else (), seed)


def of_one(
    evaluator: Any, prompt: Any, split: str, rewording: Callable[[str], str] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, what is said to every example) of a prompt, or of the backbone alone."""
    from ptjax.inference import prompts

    _, variables = prompts.prompted(evaluator.backbone, prompt)
    predictions = evaluator.predict(variables, split, rewording)
    metrics = evaluator.score(predictions, split)
    scores = {"value": metrics[evaluator.metric], "metrics": metrics}
    return scores, [{"prediction": prediction} for prediction in predictions]


def of_many(evaluator: Any, bank: Any, split: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(scores, what is said to every example) of the prompts of a bank, one by one and together."""
    answers = evaluator.ask(bank.arrays, split)
    together = {"majority_vote": answers.majority_vote}
    if answers.mean_likelihood is not None:
        together["mean_likelihood"] = answers.mean_likelihood
    said = [
        {"predictions": dict(zip(bank.names, members, strict=True))}
        | {way: texts[i] for way, texts in together.items()}
        for i, members in enumerate(zip(*answers.members, strict=True))
    ]
    return evaluator.score_ensemble(answers, split, bank.names), said


def shared_metadata(bank: Any) -> dict[str, Any]:
    """What prompts of one task say alike, as far as they say anything.

    Raises:
        InputError: two were tuned for different tasks or lengths; it names both.
    """
    shared: dict[str, Any] = {}
    sayers: dict[str, str] = {}
    for name, metadata in zip(bank.names, bank.metadata, strict=True):
        said = metadata or {}
        task = said.get("task")
        shared.setdefault("backbone_name", said.get("backbone_name"))
        for key, value in (
            ("task", task.get("name") if isinstance(task, dict) else None),
            ("input_length", said.get("input_length")),
            ("target_length", said.get("target_length")),
        ):
            if value is None:
                continue
            if shared.setdefault(key, value) != value:
                raise InputError(
                    f"prompt {name!r} has the {key.replace('_', ' ')} {value!r}, prompt "
                    f"{sayers[key]!r} {shared[key]!r}; prompts are scored together on one task, in "
                    "one way; move one elsewhere"
                )
            sayers.setdefault(key, name)
    return shared


if __name__ == "__main__":
    main()
