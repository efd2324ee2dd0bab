"""Captions and prompts for the tests of tokenizers."""

import random
import unicodedata
from functools import cache

from tinyldm.text.tokenizer import BOS, EOS


def captions() -> list[str]:
    """Captions full of ties: many words and pairs are equally frequent."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "circle", "square", "cat's", "2", "of", "a", "über", "naïve", "star!", "x-ray"]
    words += ["".join(rng.choices("abcdefg", k=rng.randint(2, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 8))) for _ in range(200)]


@cache
def nasty_prompts() -> list[str]:
    prompts = [
        "", " ", "\t\n ", "a", "A RED Circle", "  two   spaces  ", "tab\there", "new\nline\r\n", "it's we're I'll don't I'd",
        "'s", "''s 'S 'LL", "o'clock rock'n'roll", "1234 3.14 10,000", "½ ² ① Ⅷ ٣", "a.b,c;d:e!f?g", "!!!", "!", "! !a!b", "...",
        "(weights:1.3) [[x]] {y}", "C:\\path\\file <tag> & | ~", "100% $5 €7 £8", "naïve café", "nai\u0308ve cafe\u0301", "Å Å Å",
        "ΟΔΥΣΣΕΥΣ Σ ς", "İstanbul ıI", "STRASSE ẞ ß", "ﬁ ﬂ ﬀ", "Ǆ ǅ ǆ", "привет МИР", "你好，世界", "日本語 テスト", "한국어", "שלום עולם",
        "مرحبا بالعالم", "नमस्ते दुनिया", "ไทย", "🙂", "a🙂b 👩‍👩‍👧 🇩🇪 👍🏽", "❤️ ☺︎", "zero\u200bwidth", "nb\u00a0space\u2003em\u3000wide",
        "soft\u00adhyphen", "\u202eright to left", "bom\ufeff", "null\x00byte \x07 \x1b \x7f \x85", "\ue000 private \U0010ffff",
        "combining a\u0301\u0302\u0303\u0304", "z̸̢̛a̷l̵g̶o̵", "</w>", "a</w> b</w>", "Ġspace Ċ", "ÿÿ þ Ā ń", "x" * 300, "🙂" * 60,
        "word " * 100, "a b " * 50 + "end", "don't " * 60, "word" + "!" * 90, "é" * 200, "_under_score_ --dash-- #hash @at",
        BOS, EOS, f"a {EOS} b", f"{BOS}a{EOS}", f"x{EOS}y", "<|ENDOFTEXT|>", "<|endoftext", "< |endoftext| >", f"{EOS}{EOS}", f"  {BOS}  a",
        "I'M he'Ll they'RE we'Ve can'T she'D it'S O'S", "don’t it’s ‘quoted’ `s", "'sa 'tis '' ' 's's 're've'm'll'd",
        "a'S'Tb 'LLama rock'D", "&amp; &lt;b&gt; &#39; &nbsp; &eacute; &", "x&y;z", "\x01\x02\x03", "\x1c\x1d\x1e\x1f",
        "a\x0bb\x0cc", "\u2028line\u2029sep", "\u200b \u200c \u200d \u2060 \ufeff", "a\u200bb\u200dc",
        "\u180e\u3164\u115f", "ΑΣ ΑΣ. ΑΣα ΣΣ 'Σ Σ' ΑΣ\u0301 ΑΣ\u00adα", "Iı İi i̇ I\u0307", "ſ K Å Ω ΐ ŉ ǰ", "ﬃ ﬄ ﬅ ﬆ ﬓ",
        "éêë e\u0301e\u0302e\u0308", "ÅÅA\u030a", "각 각", "ạ̇ ạ̇", "\u0301 lone mark", "a\u0345 ᾳ ᾼ",
        "👨‍👩‍👧‍👦👩🏿‍🚀🏳️‍🌈🏴‍☠️", "👍🏻👍🏼👍🏽👍🏾👍🏿", "1️⃣ #️⃣", "🇩🇪🇫🇷🇺", "ქართული Ქართული", "Հայերեն", "አማርኛ", "বাংলা", "தமிழ்",
        "ລາວ မြန်မာ ខ្មែរ", "ᏣᎳᎩ ꭰ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛 Ⓐⓑ", "一二三 〇 １２３ ＡＢＣ ａｂｃ", "カタカナ ｶﾀｶﾅ ひらがな", "العَرَبِيَّة ١٢٣ ۴۵",
        "עִבְרִית", "\u2067rtl\u2069", "𐐀𐐨 𞤀𞤢", "٪ ‰ № ™ ℠ ª º", "a!?.,;b --- === ~~~ *** ((())) <<>>", "....!!!!????",
        "$$$ 1e-5 +3.5% #1 @2 0x1F", " ".join(f"word{i} it's" for i in range(200)), " ".join(map(str, range(200))),
        "\u00a0lead", "trail\u3000", " \n both \t ", "\u2003", "\u200b", "\x00", "!" * 200, "a" + "\u0301" * 80,
    ]
    rng = random.Random(1)
    ranges = [(32, 127), (32, 127), (160, 591), (768, 880), (880, 1424), (8192, 8304), (19968, 20100), (128512, 128592)]
    for _ in range(140):
        chars = (chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))
        prompts.append("".join(c + rng.choice(["", "", " "]) for c in chars))
    return prompts + anything(300)


def anything(count: int) -> list[str]:
    """Random code points, all but surrogates: half of them of any kind, half in use and thick with what rules speak of."""
    rng = random.Random(2)
    spice = ["'S", "'ll", " ", "\n", "\u200b", "\u0301", "Σ", "İ", "!", "7", "\x85", "</w>", "<|", "|>", EOS, BOS]
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    used = [c for c in every[:0x20000] if unicodedata.category(c) not in ("Cn", "Co", "Lo")]
    return ["".join(rng.choice(rng.choice([used, spice]) if i % 2 else every) for _ in range(rng.randint(1, 40)))
            for i in range(count)]
