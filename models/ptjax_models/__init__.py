"""Weights of the ptjax family: a folder SIZE-STAGE for each that is trained.

`ptjax.load_backbone("ptjax-pico")` finds them; nothing here needs to be imported for that.
"""

SIZES = ("pico", "nano", "micro", "mini")
STAGES = {"span": "runs/pretrain_family.gin", "lm": "runs/adapt_family.gin"}
"""In the order in which they train -> the gin file of `python -m ptjax.pretrain`."""
