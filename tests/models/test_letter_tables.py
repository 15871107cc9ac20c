"""A stranger's table of letters writes what Unicode says, or a letter: no word several times."""

import base64
import struct
import time
import unicodedata

import pytest
from tokenizers.normalizers import Precompiled

from blindtune.models.letter_tables import MOST_CODED, MOST_STATES, check_letter_table
from forged_tables import BLOCK, LEAF, compiled, table_step

HONEST = {
    "\ufdfa": "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064a\u0647"
    " \u0648\u0633\u0644\u0645",  # 18 letters
    "\ufb03": "ffi",
    "\u00bd": "1\u20442",
    "e\u0301": "\u00e9",
    "\r\n": " ",
    "\u3000": " ",
    "\x01": "",
    "\U0001d400": "A",
    "\u1e9e": "ss",
    "\u0130": "i\u0307",
    "\u2019": "'",
    "\u2581": " ",
    "\U00033fff": "\u0448",  # a letter that Unicode may name one day
}


def checked(step):
    check_letter_table(step["precompiled_charsmap"])


def by_the_library(step, text):
    return Precompiled(base64.b64decode(step["precompiled_charsmap"])).normalize_str(text)


def test_what_unicode_says_passes():
    step = table_step(HONEST)
    checked(step)
    assert {key: by_the_library(step, key) for key in HONEST} == HONEST


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("g", "ggg"),
        ("g", "gg"),
        ("g", "\ufdfa"),  # which NFKC makes 18 letters
        ("g", "\u4e2d"),
        ("\u00e9", "a a a"),
        ("\u2603", " a a a "),
        ("\ufdfa", " a a a a a a a a "),
        ("\ufdfa", HONEST["\ufdfa"] + "!"),
        ("\U0001d400", " a a a "),
        ("\U0001d400", "AA"),
        ("\U00033fff", "xx"),
        ("\r\n", "\n\n"),
        ("e\u0301", "eee"),
        ("\u2603\u0301", "aa"),  # five bytes
        ("\u2603", "x" * 65),
    ],
)
def test_one_entry_among_honest_ones_is_found(key, written):
    step = table_step(HONEST | {key: written})
    assert by_the_library(step, key) == written
    with pytest.raises(ValueError, match=r"a table that (makes|writes over)"):
        checked(step)


def test_a_key_of_half_a_letter_is_refused():
    units = [0] * (2 * BLOCK)
    units[0] = BLOCK << 10
    units[BLOCK ^ 0xE2] = 0xE2 << 10 | 1 << 8 | 0xE2  # to the block's beginning
    units[BLOCK] = LEAF
    step = compiled(units, b"x\0")
    assert by_the_library(step, "\u2603\u2581") == "xx"
    with pytest.raises(ValueError, match="cuts a letter into bytes"):
        checked(step)


def test_the_library_looks_up_no_longer_keys_than_are_checked():
    longer = "\u2603\u20dd"  # one grapheme of six bytes
    step = table_step({longer: "aaa"})
    checked(step)
    assert by_the_library(step, longer + "b") == longer + "b"


def test_the_library_takes_the_first_key_whole():
    """Else what two entries write could stand in the place of one grapheme."""
    step = table_step({"e": "x", "e\u0301": "\u00e9"})
    assert by_the_library(step, "e\u0301") == "x"


def circle():
    units = [0] * (2 * BLOCK)
    units[0] = BLOCK << 10
    for byte in range(1, BLOCK):
        units[BLOCK ^ byte] = byte << 10 | byte
    return compiled(units, b"x\0")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (circle(), f"a table of over {MOST_STATES:,} states"),
        (compiled([BLOCK << 10] + [0] * 255, b"x\0"), "points out of it"),
        (compiled([], b"x\0"), "points out of it"),
        (compiled([0] * 256, b"x\0", size=2**32 - 4), "with a trie of"),
        (compiled([0] * 256, b"x\0", size=1022), "with a trie of 1022"),
        ({"precompiled_charsmap": "A" * (MOST_CODED + 4)}, "expected at most 1,048,576"),
        ({"precompiled_charsmap": ""}, "a Precompiled table of 0 bytes"),
        ({"precompiled_charsmap": "!!!!"}, "base64"),
    ],
    ids=["circle", "out", "empty", "size", "odd size", "long", "nothing", "base64"],
)
def test_a_broken_or_endless_table_is_refused(step, said):
    with pytest.raises((ValueError, struct.error), match=said):
        checked(step)


@pytest.mark.parametrize("value", [2, 2**31 - 1])
def test_an_entry_that_points_behind_the_texts_is_refused(value):
    units = [0] * (2 * BLOCK)
    units[0] = BLOCK << 10
    units[BLOCK ^ ord("g")] = ord("g") << 10 | 1 << 8 | ord("g")
    units[BLOCK] = LEAF | value
    with pytest.raises(ValueError, match="points behind its end"):
        checked(compiled(units, b"x\0"))


def test_a_table_of_all_unicode_passes_in_time():
    """As `nmt_nfkc_cf`: NFKC with case folded, composed letters, control characters."""
    letters = [chr(code) for code in range(32, 0x110000) if not 0xD800 <= code < 0xE000]
    entries = {chr(code): " " if chr(code) in "\t\n\f\r" else "" for code in range(1, 32)}
    for letter in letters:
        form = unicodedata.normalize("NFKC", letter.casefold())
        apart = unicodedata.normalize("NFD", letter)
        entries |= {key: form for key in (letter, apart) if key != form and len(key) < 3}
    step = table_step(entries)
    began = time.process_time()
    checked(step)
    assert time.process_time() - began < 2, "0.1 s where nothing else runs"
    assert len(entries) > 7_000
    assert by_the_library(step, "\ufdfa\u1e9e\t\U0001d400") == f"{HONEST[chr(0xFDFA)]}ss A"
