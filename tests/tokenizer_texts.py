"""200 fixed texts on which tokenizers are compared: languages, digits, spaces, code, added tokens.

Plain Python, so that the scripts of `tests/oracles` can import it in environments of their own.
"""

# ruff: noqa: RUF001  (letters that look alike are wanted here)
from __future__ import annotations

import random

ADDED = ("[ORG]", "<hl>", "{")
"""What users add to a vocabulary: a word of its own, a mark, a character that T5 lacks."""
CONTROL = ("</s>", "<pad>", "<unk>", "<s>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<mask>")

_WORDS = """
the film is a fine old story of love and war, but its plot seems thin ; I don't know why
Haus Straße größer naïve café Ελλάδα Москва привет 映画 電影 日本語 テレビ 한국어 مرحبا שלום हिन्दी
ไทย Việt Nam 3.14 1,000,000 2024-05-17 $9.99 50% x=y+1 foo_bar(baz) {key: [1, 2]} <b>bold</b>
http://a.example/?q=1&r=2 e.g. U.S.A. #tag @user C++ 'quoted' "double" -- ... !? ½ ™ ﬁsh Ａｂｃ ①
🙂 👩‍👩‍👧 ① Å µm ¡hola! l’été co-op \\n /* no */ if(a<b) return; «oui» x²
"""
_SPACES = (" ", " ", " ", "  ", "   ", "\t", "\n", "\u00a0", "\u3000", "\r\n", "")
_AWKWARD = (
    "", " ", "\t\n ", " leading", "trailing ", "two  spaces", "tabs\tand\nlines\r\n", "a\u00a0b",
    "zero\u200bwidth", "▁", "a▁b", "▁▁x", "e\u0301 and é", "x" * 60, "0" * 25, "ﬀ ﬁ ﬂ", "...!!!???",
    "a\u0000b", "\ufeffmark", "soft\u00adhyphen", "<extra_id>", "<extra_id_",
    "extra_id_0>", "< /s>",
    "[ ORG ]", "<HL>", "{{}}", "}{", "[]", "<>", "｛", "<ｈl>", "ORG", "hl",
)  # fmt: skip


def texts(added: tuple[str, ...] = ADDED) -> list[str]:
    """200 texts without control tokens; a third of them hold tokens of `added`, some sentinels."""
    draw = random.Random(0)
    made = [*_AWKWARD]
    made += [f"{token}{near}" for token in added for near in ("", " x", "x", ".", "s", token)]
    made += [f"{near}{token}" for token in added for near in ("the", "the ", "(", "\n", "  ")]
    made += ["<extra_id_0>", "the<extra_id_1>film", "the <extra_id_2> film <extra_id_3>"]
    while len(made) < 200:
        words = draw.choices(_WORDS.split(), k=draw.randint(1, 14))
        if len(made) % 3 == 0 and added:
            words.insert(draw.randrange(len(words)), draw.choice(added))
        if len(made) % 11 == 0:
            words.insert(draw.randrange(len(words)), f"<extra_id_{draw.randrange(5)}>")
        made.append("".join(word + draw.choice(_SPACES) for word in words))
    return made[:200]


def control_texts() -> list[str]:
    """Texts with the names of control tokens in them, wherever they may stand."""
    return [
        text
        for token in CONTROL
        for text in (token, f"a {token} b", f"a{token}b", f"{token}{token}", f"the end.{token}")
    ]
