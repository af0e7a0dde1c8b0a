"""`python -m ptjax.train`: prompt tuning, model tuning, or scoring a hard prompt."""

from __future__ import annotations

from typing import Any

from ptjax import cli


def main() -> None:
    parser = cli.make_parser(
        "train",
        "Tunes a soft prompt on a frozen T5 and writes MODEL_DIR: prompts/best.safetensors, "
        "results.json, metrics.jsonl, tensorboard/, checkpoints/, config.gin. A run that was "
        "stopped goes on when the same command is given again.",
        gin_help="For example quickstart.gin, or tasks/sst2.gin and runs/prompt_tune.gin.",
        exit_codes=cli.RUN_EXIT_CODES,
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="compile the step, print the report, stop"
    )
    arguments = cli.parse(parser)

    def body() -> None:
        from ptjax import tuning  # here, so that --help need not wait for JAX

        cli.load_gin(arguments)
        results = cli.bound(tuning.tune)(config=cli.config_text(), dry_run=arguments.dry_run)
        if results:
            print(summary(results, cli.macro("MODEL_DIR")))

    cli.run(body)


def summary(results: dict[str, Any], model_dir: str | None) -> str:
    """The results as a person reads them."""

    def row(name: str, value: float | None) -> str:
        return f"  {name:<34}{value:8.3f}" if value is not None else ""

    rows = [
        f"\n{results['task']}, {results['metric']} on {results['split']}:",
        row("always the majority", results["majority"]),
        row("hard prompt", results["hard_prompt"]),
        *(row(f"hard prompt: {k}", v) for k, v in results["other_hard_prompts"].items()),
        row("before training", results["before"]),
        row(f"tuned (step {results['step']})", results["value"] if results["step"] else None),
        f"  {results['trainable_parameters']:,} trained, {results['frozen_parameters']:,} frozen",
    ]
    if model_dir and results["step"]:  # a hard prompt leaves nothing to infer with
        rows.append(
            f"\ntry it:  python -m ptjax.infer --model_dir={model_dir} 'a text of your own'"
        )
    return "\n".join(line for line in rows if line)


if __name__ == "__main__":
    main()
