"""`python -m ptjax.evaluate`: scores a prompt, a hard prompt or a backbone alone on a split."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ptjax import cli
from ptjax.cli import distributed, model_flags, output
from ptjax.cli.gin_files import left_out
from ptjax.errors import InputError
from ptjax.files import Metadata

if TYPE_CHECKING:
    from ptjax.data.hard_prompt import HardPrompt


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
          python -m ptjax.evaluate --model_dir=runs/old --report=runs/old
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
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="write a report on the predictions to DIR, report.json and report.html; DIR may be "
        "the run's own folder",
    )
    output.add_flags(parser, "write inputs, targets and predictions as JSON lines")
    output.add_prefix_flag(parser)
    distributed.add_flags(parser)
    arguments = cli.parse(parser)
    cli.run(lambda: evaluate(arguments), arguments)


def evaluate(arguments: argparse.Namespace) -> None:
    """Scores what the flags choose with `ptjax.evaluate`, and prints the scores as JSON.

    Args:
        arguments: the parsed flags.
    """
    from ptjax.evaluation import evaluate
    from ptjax.evaluation.evaluator import reported_split
    from ptjax.evaluation.report import check_report
    from ptjax.settings import RunSettings
    from ptjax.sharding import processes

    if arguments.output:
        output.check(arguments.output, force=arguments.force, inputs=model_flags.inputs(arguments))
    if arguments.report is not None:
        check_report(arguments.report, force=arguments.force)
    hard_prompt = read_hard_prompt(arguments)
    model_flags.load(arguments, reads_data=True)
    if arguments.prompt is None and arguments.prompts is None and arguments.adapter is None:
        arguments.prompts = model_flags.trained_bank(arguments)
    many = arguments.prompts is not None
    prompt = model_flags.load_bank(arguments) if many else model_flags.load_prompt(arguments)
    metadata = evaluate.metadata_of(prompt)
    task = model_flags.task(metadata)
    if task is None:
        raise no_task(metadata)
    settings = RunSettings(**cli.settings(model_flags.SETTINGS, "evaluation", "seed"))
    evaluation = settings.evaluation
    scores = evaluate.evaluate(
        model_flags.load_backbone(arguments, metadata),
        task,
        hard_prompt or prompt,
        split=arguments.split or reported_split(task, evaluation.split),
        examples=evaluation.examples,
        predict=evaluation.predict,
        batch_size=evaluation.batch_size,
        feature_lengths=model_flags.lengths(metadata),
        seed=settings.seed,
        allow_mismatch=arguments.allow_mismatch,
        report=arguments.report,
        output=arguments.output,
        force=arguments.force,
        prefix=arguments.prefix,
    )
    if processes.first():
        path = None if many else model_flags.prompt_path(arguments)
        scores |= {"prompts": arguments.prompts} if many else {"prompt": path}
        output.show(output.as_json(scores, indent=2))


def no_task(metadata: Metadata) -> InputError:
    """The error if nothing names the task; the prompt's metadata may say why."""
    from ptjax.data.memory import not_in_a_file

    described = metadata.get("task")
    if isinstance(described, dict) and described.get("in_memory"):
        return not_in_a_file(str(described.get("name")))
    if reason := left_out("ptjax.tune.task"):
        return InputError(f"{reason}; evaluate there, or name a --gin_file with the task")
    return InputError("which task? Name it with a --gin_file or --model_dir (see --help)")


def read_hard_prompt(arguments: argparse.Namespace) -> HardPrompt | None:
    """Makes the hard prompt (fixed text that is added to every input) that the flags describe.

    Returns None if --hard_prompt is not set. Otherwise sets `arguments.prompt` to "none", so that
    the backbone is scored without a tuned prompt.

    Raises:
        InputError: --hard_prompt is combined with --prompt, --prompts or --adapter, --shots is
            negative, or it is set without --hard_prompt.
    """
    from ptjax.data.hard_prompt import HardPrompt

    if arguments.hard_prompt is None:
        if arguments.shots:
            raise InputError("--shots belongs to a hard prompt: add --hard_prompt=TEXT")
        return None
    for name in ("prompt", "prompts", "adapter"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--hard_prompt and --{name} are mutually exclusive")
    arguments.prompt = "none"
    return HardPrompt(arguments.hard_prompt, arguments.shots)


if __name__ == "__main__":
    main()
