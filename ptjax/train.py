"""`python -m ptjax.train`: tunes a prompt, or what another method trains."""

from __future__ import annotations

from ptjax import cli
from ptjax.cli import distributed, output
from ptjax.files import Metadata
from ptjax.model_dir import ModelDir


def main() -> None:
    """Runs `python -m ptjax.train` with the flags of the command line."""
    parser = cli.make_parser(
        "train",
        "Tunes a soft prompt on a frozen T5 and writes MODEL_DIR: prompts/best.safetensors, "
        "results.json, metrics.jsonl, tensorboard/, checkpoints/, config.gin. Rerun the same "
        "command to resume a run that was stopped.",
        gin_help="For example quickstart.gin, or tasks/sst2.gin and runs/prompt_tune.gin.",
        exit_codes=cli.RUN_EXIT_CODES,
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="compile the step, print the report and stop"
    )
    distributed.add_flags(parser, saves=True)
    arguments = cli.parse(parser)

    def body() -> None:
        from ptjax.sharding import processes
        from ptjax.trainer import config_file, tune

        cli.load_gin(arguments)
        callbacks = cli.settings(tune.tune, "callbacks").get("callbacks", ())
        run = cli.bound(tune.tune)(
            callbacks=[config_file.ConfigFile(cli.config_text()), *callbacks],
            dry_run=arguments.dry_run,
        )
        if run.results and processes.first():
            output.show(summary(run.results, cli.macro("MODEL_DIR")))

    cli.run(body, arguments)


def summary(results: Metadata, model_dir: str | None) -> str:
    """Formats the content of `results.json` as text, with a command to try the prompt.

    Args:
        model_dir: MODEL_DIR for that command; None leaves out the command.
    """
    if "members" in results:
        return sweep_summary(results, model_dir)
    values = {
        "always the majority": results["majority"],
        **{f"hard prompt: {name}": value for name, value in results["hard_prompts"].items()},
        "before training": results["before"],
        f"tuned (step {results['step']})": results["value"],
    }
    width = max(map(len, values))
    rows = [
        f"\n{results['task']}, {named_metric(results)} on {results['split']}:",
        *(f"  {name:<{width}}  {value:.3f}" for name, value in values.items()),
        f"  {results['trainable_parameters']:,} trained, {results['frozen_parameters']:,} frozen",
    ]
    if model_dir:
        rows.append(
            f"\ntry it:  python -m ptjax.infer --model_dir={model_dir} 'a text of your own'"
        )
    return "\n".join(rows)


def named_metric(results: Metadata) -> str:
    """Returns the name of the metric that `results` reports, as text for the user.

    It names the label of an F1: "f1 of 'paraphrase'".

    Args:
        results: the content of `results.json`, or the part of one member of a sweep.
    """
    metric, label = results["metric"], results.get("positive_label")
    if label is None or metric not in ("f1", "mean"):
        return metric
    return f"f1 of {label!r}" if metric == "f1" else f"mean (f1 of {label!r})"


def sweep_summary(results: Metadata, model_dir: str | None) -> str:
    """Formats the `results.json` of a sweep, which trains several members (prompts) in one run.

    The text has a line for each member and lines for their average and their ensembles. The
    arguments are those of `summary`.
    """
    members, best = results["members"], results["best"]["member"]
    width = max(map(len, [*members, "ensemble"]))
    rows = [""]
    for name, scores in members.items():
        metric = f"{scores['task']}, {named_metric(scores)} on {scores['split']}"
        note = ", the best when it was chosen" if name == best else ""
        rows.append(
            f"  {name:<{width}}  {scores['value']:.3f}  {metric}, step {scores['step']}{note}"
        )
    rows.append(f"  {'average':<{width}}  {results['average']:.3f}")
    for vote, metrics in results.get("ensemble", {}).items():
        metric = members[best]["metric"]
        rows.append(f"  {'ensemble':<{width}}  {metrics[metric]:.3f}  {vote.replace('_', ' ')}")
    if results["failed"]:
        rows.append(f"  failed (a loss was not finite): {', '.join(results['failed'])}")
    rows.append(
        f"  {results['trainable_parameters']:,} trained, {results['frozen_parameters']:,} frozen"
    )
    if model_dir:
        prompt = ModelDir(model_dir).best_prompt(best)
        adapter = ModelDir(model_dir).exports("adapter", best) / prompt.name
        flag = f"--adapter={adapter}" if adapter.exists() else f"--prompt={prompt}"
        rows.append(f"\ntry it:  python -m ptjax.infer {flag} 'a text of your own'")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
