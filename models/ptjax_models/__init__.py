"""Weights of the ptjax family: a folder SIZE-STAGE for each trained stage.

`ptjax.load_backbone("ptjax-pico")` finds them; nothing here needs to be imported for that.
"""

SIZES = ("pico", "nano", "micro", "mini")
STAGES = {"span": "runs/pretrain_family.gin", "lm": "runs/adapt_family.gin"}
"""Stage -> its gin file for `python -m ptjax.pretrain`, in the order of training."""
