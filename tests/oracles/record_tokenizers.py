"""Records tokenizer folders that this release of transformers saves, and the ids that it gives.

`make oracle` runs it under transformers 4, then under 5, which reads the folders of both.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
from tokenizer_folders import FIXTURES, pack, unpack, write_source
from tokenizer_texts import ADDED, texts

RELEASE = transformers.__version__.split(".")[0]
SPECIAL = {"4": "additional_special_tokens", "5": "extra_special_tokens"}[RELEASE]


def add_tokens(tokenizer: Any, newline: bool) -> Any:
    """Every kind of token that users add; some are pieces of the vocabulary already."""
    tokenizer.add_tokens([*ADDED, "film", *["\n"] * newline])
    stripping = [
        transformers.AddedToken("<l>", lstrip=True, normalized=False),
        transformers.AddedToken("<r>", rstrip=True),
        transformers.AddedToken("plot", single_word=True),
    ]
    tokenizer.add_tokens(stripping)
    tokenizer.add_special_tokens({SPECIAL: ["<sep>"]}, **{f"replace_{SPECIAL}": False})
    return tokenizer


def write_folders(scratch: Path) -> dict[str, Any]:
    source = write_source(scratch / "source")
    loaders = {"5": transformers.AutoTokenizer.from_pretrained}
    if RELEASE == "4":
        slow = transformers.T5Tokenizer.from_pretrained
        fast = transformers.T5TokenizerFast.from_pretrained
        loaders = {"4 slow": slow, "4 fast": fast, "4 slow, newline": slow}
    folders = {}
    for name, load in loaders.items():
        tokenizer = add_tokens(load(source), "newline" in name)
        tokenizer.save_pretrained(scratch / name)
        folders[name] = pack(scratch / name)
    return folders


def derived(folders: dict[str, Any]) -> dict[str, Any]:
    """Folders as other releases and users leave them."""
    old = json.loads(json.dumps(folders["4 slow"]))  # before 4.34 without added_tokens_decoder
    del old["tokenizer_config.json"]["added_tokens_decoder"]
    kept = ("tokenizer.json", "tokenizer_config.json")
    alone = {name: folders["4 fast"][name] for name in kept}
    return {"4.33 slow": old, "4 fast, tokenizer.json": alone}


def read(name: str, files: dict[str, Any], scratch: Path) -> list[list[int]]:
    folder = unpack(files, scratch / f"read {name}")
    if RELEASE == "4":
        kind = transformers.T5TokenizerFast if "fast" in name else transformers.T5Tokenizer
        tokenizer = kind.from_pretrained(folder)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    added = (*ADDED, "film", "<l>", "<r>", "plot", "<sep>")
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts(added)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        folders = write_folders(scratch)
        if RELEASE == "4":
            folders |= derived(folders)
        every = dict(folders)
        if RELEASE == "5":
            every |= json.loads((FIXTURES / "tokenizers_4.json").read_text())["folders"]
        ids = {name: read(name, files, scratch) for name, files in sorted(every.items())}
    # Most folders give the same: of all but the first, what differs.
    first, *rest = ids
    changed = {
        name: {i: row for i, row in enumerate(ids[name]) if row != ids[first][i]} for name in rest
    }
    record = {
        "versions": {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "folders": folders,
        "ids": {first: ids[first]},
        "changed": changed,
    }
    FIXTURES.mkdir(parents=True, exist_ok=True)
    target = FIXTURES / f"tokenizers_{RELEASE}.json"
    target.write_text(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{target.name}: {len(ids)} folders, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
