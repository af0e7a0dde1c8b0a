"""Weights of the ptjax family, a folder for each size and stage.

`ptjax.load_backbone("ptjax-pico")` finds them; nothing here needs to be imported.
"""
