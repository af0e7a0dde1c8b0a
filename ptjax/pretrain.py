"""`python -m ptjax.pretrain`: trains a backbone from scratch, or does the LM adaptation of one."""

from __future__ import annotations

from ptjax import cli
from ptjax.cli import distributed


def main() -> None:
    """Runs `python -m ptjax.pretrain` with the flags of the command line."""
    parser = cli.make_parser(
        "pretrain",
        "Trains all weights of a T5 on span corruption, prefix LM and supervised tasks, and "
        "writes MODEL_DIR/models/best in Hugging Face's layout. Rerun the same command to resume a "
        "run that was stopped.",
        gin_help="For example runs/pretrain_nano.gin.",
        exit_codes=cli.RUN_EXIT_CODES,
    )
    parser.add_argument("--dry_run", action="store_true", help="compile the steps and stop")
    distributed.add_flags(parser, saves=True)
    arguments = cli.parse(parser)

    def body() -> None:
        from ptjax.trainer import config_file, pretrain

        cli.load_gin(arguments)
        callbacks = cli.settings(pretrain.pretrain, "callbacks").get("callbacks", ())
        cli.bound(pretrain.pretrain)(
            callbacks=[config_file.ConfigFile(cli.config_text()), *callbacks],
            dry_run=arguments.dry_run,
        )

    cli.run(body, arguments)


if __name__ == "__main__":
    main()
