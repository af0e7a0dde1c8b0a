"""`python -m ptjax`, or `ptjax`: lists the commands, or runs one of them."""

from __future__ import annotations

import runpy
import sys

import ptjax

COMMANDS = {
    "train": "tunes a prompt, a prefix, LoRA, IA3, BitFit or the whole model",
    "evaluate": "scores a prompt or adapter on a split, or many prompts and their ensemble",
    "infer": "texts or JSON lines in, JSON lines out",
    "report": "a page about a run, or a comparison of several",
    "inspect": "describes a checkpoint or a prompt",
    "export": "a prompt or adapter as safetensors, for Hugging Face PEFT, or merged",
    "convert": "a TFDS data set in tfrecord as array_record",
    "pretrain": "a backbone from scratch, or the LM adaptation of one",
    "plan": "predicts whether a run fits a slice, and what a step costs",
    "launch": "runs a command on several processes",
}


def main() -> None:
    """Runs the command that the first argument names, as `python -m ptjax.COMMAND` would."""
    name = sys.argv[1] if sys.argv[1:] else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"ptjax.{name}"]
        runpy.run_module(f"ptjax.{name}", run_name="__main__", alter_sys=True)
    elif name == "--version":
        print(f"ptjax {ptjax.__version__}")
    elif name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print("Soft prompt tuning of frozen T5 models in JAX. The commands, each with --help:\n")
        for command, what in COMMANDS.items():
            print(f"  python -m ptjax.{command:<{width}}  {what}")
    else:
        from ptjax.errors import near

        kind = "flag" if name.startswith("-") else "command"
        choices = ["--help", "--version"] if kind == "flag" else COMMANDS
        print(f"error: unknown {kind} {name}{near(name, choices)}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
