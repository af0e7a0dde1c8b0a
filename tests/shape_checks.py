"""Checks the shapes in signatures while tests run, and only then: import it before ptjax."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# A gin file may write 0 for 0.0.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

install_import_hook(["ptjax.models", "ptjax.training.loss"], "shape_checks.checked")
