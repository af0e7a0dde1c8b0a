"""`gin_configs/models/`: every released size, to the unit, and the table of them in the docs."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import gin
import pytest

from ptjax.models.config import T5Config
from ptjax.models.t5 import parameter_shapes
from ptjax.sharding.rules import RULES
from ptjax.trees import flatten_paths

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "gin_configs" / "models").glob("*.gin"))

# Counted in the Flax trees of T5X's own gin files; T5 1.1's are those of Lester et al. 2021.
SMALL_TO_LARGEST = {
    "t5_1_1": ("small", "base", "large", "xl", "xxl"),
    "flan_t5": ("small", "base", "large", "xl", "xxl"),
    "mt5": ("small", "base", "large", "xl", "xxl"),
    "byt5": ("small", "base", "large", "xl", "xxl"),
    "t5_1_0": ("small", "base", "large", "3b", "11b"),
}
T5_1_1 = (76_961_152, 247_577_856, 783_150_080, 2_849_757_184, 11_135_332_352)
TOTALS = {
    "t5_1_1": T5_1_1,
    "flan_t5": T5_1_1,
    "mt5": (300_176_768, 582_401_280, 1_229_581_312, 3_742_619_648, 12_921_057_280),
    "byt5": (299_637_760, 581_653_248, 1_228_183_552, 3_737_801_728, 12_906_899_328),
    "t5_1_0": (60_506_624, 222_903_552, 737_668_096, 2_851_598_336, 11_307_321_344),
}
RELEASED = {
    f"{family}_{size}": total
    for family, sizes in SMALL_TO_LARGEST.items()
    for size, total in zip(sizes, TOTALS[family], strict=True)
}


@pytest.fixture(autouse=True)
def no_gin_left():
    gin.clear_config()
    yield
    gin.clear_config()


def build(name: str) -> T5Config:
    """The `T5Config` that gin makes after this one file."""
    gin.parse_config_file(str(ROOT / "gin_configs" / "models" / f"{name}.gin"))
    return gin.get_configurable(T5Config)()


@functools.cache
def shapes_of(config: T5Config) -> dict[str, tuple[int, ...]]:
    shapes = flatten_paths({"params": parameter_shapes(config)})
    return {path: leaf.shape for path, leaf in shapes.items()}


def table() -> dict[str, list[str]]:
    """Rows of docs/models.md: file -> the other cells."""
    rows = {}
    for line in (ROOT / "docs" / "models.md").read_text().splitlines():
        if match := re.match(r"\| `(\w+)` \|(.*)\|$", line):
            rows[match[1]] = [cell.strip() for cell in match[2].split("|")]
    return rows


def test_every_released_size_has_a_file_and_a_row():
    names = {file.stem for file in FILES}
    family = {f"ptjax_{size}" for size in ("pico", "nano", "micro", "mini")}
    assert names == RELEASED.keys() | family == set(table())


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_a_file_its_total_and_its_row_agree(name):
    config = build(name)
    shapes = shapes_of(config)
    total = sum(map(math.prod, shapes.values()))
    assert total == RELEASED.get(name, total)
    gated = config.mlp_activations == ("gelu", "linear")
    assert gated or config.mlp_activations == ("relu",)
    assert table()[name] == [
        str(config.emb_dim),
        str(config.mlp_dim),
        str(config.num_heads),
        str(config.head_dim),
        f"{config.num_encoder_layers} / {config.num_decoder_layers}",
        str(config.vocab_size),
        "gated GELU" if gated else "relu",
        "tied" if config.logits_via_embedding else "untied",
        f"{total:,}",
    ]
    for path in shapes:
        rules = [pattern for pattern, _ in RULES if re.fullmatch(pattern, path)]
        assert len(rules) == 1, path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_holds_sizes_and_nothing_else(file):
    bound = re.findall(r"^([\w./]+) *=", file.read_text(), re.MULTILINE)
    assert bound
    assert all(name.startswith("ptjax.T5Config.") for name in bound)
    assert len(set(bound)) == len(bound)
    assert not {"ptjax.T5Config.dtype", "ptjax.T5Config.dropout_rate"} & set(bound)
