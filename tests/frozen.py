"""Settings and values do not change after they were made: `assert_frozen` for a room."""

from __future__ import annotations

import importlib
import inspect
import pkgutil


def assert_frozen(package: str, *mutable: str) -> None:
    """All dataclasses that `package` ("ptjax.data") defines are frozen, but for those named."""
    room = importlib.import_module(package)
    names = [module.name for module in pkgutil.walk_packages(room.__path__, f"{package}.")]
    classes = {
        value
        for module in map(importlib.import_module, [package, *names])
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    made = [c for c in classes if "__dataclass_fields__" in vars(c)]
    assert made, f"{package} defines no dataclass"
    changeable = {c.__name__ for c in made if not c.__dataclass_params__.frozen}
    wrong = sorted(changeable ^ set(mutable))
    assert not wrong, f"{package}: frozen or not, against what the test says: {wrong}"
