import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tlk.demo.generate import EMBEDDED
from tlk.hf.detokenize import Detokenizer

TEXT = "def naïve(x):\n    return 'Grüße, 世界! 👩‍👩‍👧 🇨🇭 e\u0301' # [ok]  two  spaces \ufffd end"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def byte_level():
    """The embedded model's: byte-level BPE; an emoji is up to four tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("[ok]", special=False)])
    return tokenizer


def metaspace(fallback=True):
    """As sentencepiece does: spaces before words, and bytes for what is not in the vocabulary."""
    words = [*"abcdefghijklmnop", *"▁▁", "▁the", "▁a", "er", "▁é", "\n", "世", "▁▁", "ing"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *dict.fromkeys(words)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    if not fallback:
        tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_piece():
    words = ["[UNK]", "[SEP]", "a", "the", "##s", "##ing", "go", ".", "!", "'", "n't", "世", "##é"]
    vocabulary = {piece: i for i, piece in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", sep_token="[SEP]", eos_token="[SEP]"
    )


def slow_bytes():
    """A tokenizer in Python, with no fast one: a token per byte."""
    return ByT5Tokenizer()


TOKENIZERS = {f.__name__: f for f in (byte_level, metaspace, word_piece, slow_bytes)}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def decode(tokenizer, ids, skip=True):
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def split(ids, rng):
    """`ids` in chunks of random sizes, often one token."""
    while ids:
        size = rng.choice([1, 1, 1, 2, 3, 9, 40, 0])
        yield ids[:size]
        ids = ids[size:]


def pieces(detokenizer, chunks):
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


def random_ids(tokenizer, rng, size):
    """Whole texts among random tokens, so that there are characters both whole and broken."""
    ids = []
    while len(ids) < size:
        if rng.random() < 0.5:
            start = rng.randrange(len(TEXT))
            text = TEXT[start : start + rng.randrange(12)]
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            special = rng.random() < 0.1
            ids.append(
                rng.choice(tokenizer.all_special_ids) if special else rng.randrange(len(tokenizer))
            )
    return ids


def lossy(tokenizer, ids, skip):
    """The text of `ids`; broken runs of byte tokens as UTF-8 decoders replace them."""
    names = tokenizer.convert_ids_to_tokens(ids)
    if skip:
        names = [n for n in names if n not in tokenizer.all_special_tokens]
    data = b"".join(
        bytes([int(n[3:5], 16)]) if n.startswith("<0x") else n.replace("▁", " ").encode()
        for n in names
    )
    return data.decode(errors="replace")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("prompted", [False, True])
def test_the_pieces_are_the_tokenizers_own_text(tokenizer, skip, prompted):
    rng = random.Random(7)
    for _ in range(150):
        prompt = tokenizer("the a", add_special_tokens=False)["input_ids"] * prompted
        ids = random_ids(tokenizer, rng, rng.randrange(60))
        if "<0x00>" in tokenizer.get_vocab():
            whole = lossy(tokenizer, prompt + ids, skip)
            expected = whole[len(lossy(tokenizer, prompt, skip)) :]
            expected = expected if prompted else expected.removeprefix(" ")
        else:
            whole = decode(tokenizer, prompt + ids, skip)
            expected = whole[len(decode(tokenizer, prompt, skip)) :]
        detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
        assert "".join(pieces(detokenizer, split(ids, rng))) == expected == detokenizer.text
        again = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
        assert "".join(pieces(again, [[i] for i in ids])) == expected
        assert detokenizer.stopped is None


@pytest.mark.parametrize("maker", [byte_level, metaspace, slow_bytes], ids=lambda f: f.__name__)
def test_no_piece_holds_half_a_character(maker):
    tokenizer = maker()
    text = TEXT.replace(UNKNOWN, "") * 3
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) // 4
    parts = pieces(Detokenizer(tokenizer, []), [[i] for i in ids])
    assert not any(UNKNOWN in part for part in parts)
    assert parts[-1] == "" and sum(part == "" for part in parts) > 20
    assert "".join(parts) == decode(tokenizer, ids)


def test_text_comes_as_soon_as_it_is_final():
    tokenizer = byte_level()
    ids = tokenizer("a👩b")["input_ids"]
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push([i]) for i in ids] == ["a", *[""] * (len(ids) - 3), "👩", "b"]
    assert (detokenizer.text, detokenizer.finish()) == ("a👩b", "")


def test_an_unfinished_character_at_the_end():
    for tokenizer in (byte_level(), metaspace()):
        ids = tokenizer("👩", add_special_tokens=False)["input_ids"][-4:-1]
        detokenizer = Detokenizer(tokenizer, [])
        assert [detokenizer.push([i]) for i in ids] == [""] * 3
        assert detokenizer.text == ""
        assert (detokenizer.finish(), detokenizer.text, detokenizer.finish()) == (
            UNKNOWN,
            UNKNOWN,
            "",
        )
        with pytest.raises(ValueError, match="no token can follow finish"):
            detokenizer.push(ids)


@pytest.mark.parametrize("maker", [byte_level, metaspace], ids=lambda f: f.__name__)
def test_the_output_may_finish_the_prompts_character(maker):
    tokenizer = maker()
    *start, last = tokenizer("👩", add_special_tokens=False)["input_ids"][-4:]
    (letter,) = tokenizer.convert_tokens_to_ids(["b"])
    assert pieces(Detokenizer(tokenizer, start), [[last, letter]]) == ["👩b", ""]
    assert pieces(Detokenizer(tokenizer, start), [[letter], [letter]]) == ["b", "b", ""]
    broken = pieces(Detokenizer(tokenizer, start), [[letter], [last, letter]])
    assert broken == ["b", f"{UNKNOWN}b", ""]
    assert pieces(Detokenizer(tokenizer, start), []) == [""]


def test_a_words_space_depends_on_what_precedes():
    for tokenizer in (metaspace(), metaspace(fallback=False)):
        the, s = tokenizer.convert_tokens_to_ids(["▁the", "<s>"])
        assert pieces(Detokenizer(tokenizer, []), [[the], [the]]) == ["the", " the", ""]
        assert pieces(Detokenizer(tokenizer, [the]), [[the]]) == [" the", ""]
        assert pieces(Detokenizer(tokenizer, [the] + 30 * [s]), [[the]]) == [" the", ""]
        assert pieces(Detokenizer(tokenizer, [s]), [[s], [the]]) == ["", "the", ""]
        space = tokenizer.convert_tokens_to_ids("▁")
        assert "".join(pieces(Detokenizer(tokenizer, []), [[space], [the]])) == " the"


def test_a_token_that_only_looks_like_a_byte():
    tokenizer = metaspace(fallback=False)
    letter = tokenizer.convert_tokens_to_ids("<0x41>")
    assert pieces(Detokenizer(tokenizer, []), [[letter]]) == ["<0x41>", ""]
    assert pieces(Detokenizer(metaspace(), []), [[letter]]) == ["A", ""]


def test_special_tokens():
    tokenizer = byte_level()
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    (a,) = tokenizer("a")["input_ids"]
    ids = [[eos], [a], *[[end]] * 40, [a, eos]]
    assert "".join(pieces(Detokenizer(tokenizer, [a]), ids)) == "aa"
    shown = "".join(pieces(Detokenizer(tokenizer, [a], skip_special_tokens=False), ids))
    assert shown == f"<|endoftext|>a{'<|end|>' * 40}a<|endoftext|>"


def test_special_tokens_do_not_break_a_character():
    tokenizer = metaspace()
    first, *rest = tokenizer("€", add_special_tokens=False)["input_ids"][-3:]
    the, s = tokenizer.convert_tokens_to_ids(["▁the", "<s>"])
    for many in (1, 20):
        chunks = [[first], [s] * many, [rest[0]], [s] * many, [rest[1]], [the]]
        assert pieces(Detokenizer(tokenizer, [the]), chunks) == [*[""] * 4, "€", " the", ""]
        broken = [[first], [s] * many, [the] * many]
        expected = ["", "", UNKNOWN + " the" * many, ""]
        assert pieces(Detokenizer(tokenizer, [the]), broken) == expected


def test_ids_beyond_the_tokenizer_have_no_text():
    tokenizer = metaspace()
    the = tokenizer.convert_tokens_to_ids("▁the")
    ids = [[the], *[[len(tokenizer) + 7]] * 40, [the]]
    assert "".join(pieces(Detokenizer(tokenizer, []), ids)) == "the the"


def run(stop, chunks, **options):
    """Push texts, a token a character: (the pieces, the stop string)."""
    tokenizer = slow_bytes()
    detokenizer = Detokenizer(tokenizer, [], stop=stop, **options)
    ids = [tokenizer(chunk, add_special_tokens=False)["input_ids"] for chunk in chunks]
    parts = pieces(detokenizer, ids)
    assert "".join(parts) == detokenizer.text
    return parts, detokenizer.stopped


@pytest.mark.parametrize(
    "stop, chunks, expected, met",
    [
        (["\n\n"], "ab\n\nc", ["a", "b", "", "", "", ""], "\n\n"),
        (["\n\n"], "a\nb\n", ["a", "", "\nb", "", "\n"], None),
        (["stop"], ["xstopy"], ["x", ""], "stop"),
        (["aab"], "aaab", ["", "", "a", "", ""], "aab"),
        (["abab"], "abaabab", ["", "", "", "aba", "", "", "", ""], "abab"),
        (["lo", "world", "hell"], ["hello world"], ["", ""], "hell"),
        (["world", "lo"], ["hello world"], ["hel", ""], "lo"),
        (["c", "bcd"], ["abcd"], ["ab", ""], "c"),
        (["c", "bc"], ["abc"], ["a", ""], "bc"),
        (["end", "e"], ["bend"], ["b", ""], "e"),
        (["é👩"], "né👩a", ["n", "", "", "", ""], "é👩"),
    ],
)
def test_stop_strings(stop, chunks, expected, met):
    assert run(stop, chunks) == (expected, met)
    whole = run(stop, ["".join(chunks)])
    assert ("".join(whole[0]), whole[1]) == ("".join(expected), met)


def test_a_stop_string_may_be_included():
    assert run(["top", "x"], "stopx", include_stop=True) == (["s", "", "", "top", "", ""], "top")
    assert run(["top"], "sto", include_stop=True) == (["s", "", "", "to"], None)


def test_stops_are_met_in_the_output_alone():
    tokenizer = byte_level()
    ids = tokenizer("for i in")["input_ids"]
    detokenizer = Detokenizer(tokenizer, tokenizer("a\n")["input_ids"], stop=["\nfor", "a", "\n"])
    assert detokenizer.push(ids) == "for i in"
    assert detokenizer.stopped is None
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    shown = Detokenizer(tokenizer, [], stop=["|end|"], skip_special_tokens=False)
    assert shown.push([*ids, end, *ids]) == "for i in<" and shown.stopped == "|end|"


@pytest.mark.parametrize("stop", ["\n", [""], ["a", None], [b"a"]])
def test_bad_stop_strings(stop):
    with pytest.raises(ValueError, match="stop must be a list of strings"):
        Detokenizer(byte_level(), [], stop=stop)


@pytest.mark.parametrize("seed", range(3))
def test_any_split_stops_at_the_same_place(seed):
    rng, tokenizer = random.Random(seed), byte_level()
    for _ in range(100):
        ids = random_ids(tokenizer, rng, 40)
        text = decode(tokenizer, ids)
        at = [rng.randrange(len(text)) for _ in range(3)]
        stop = [text[i : i + rng.randrange(1, 6)] for i in at]
        detokenizer = Detokenizer(tokenizer, [], stop=stop)
        "".join(pieces(detokenizer, split(ids, rng)))
        found = [(text.index(s) + len(s), text.index(s), s) for s in stop]
        _, start, met = min(found)
        assert (detokenizer.text, detokenizer.stopped) == (text[:start], met)


class Counted:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def convert_ids_to_tokens(self, token_id):
        return self.tokenizer.convert_ids_to_tokens(token_id)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("kind", ["text", "broken", "special"])
def test_cost_per_token_does_not_grow(tokenizer, kind):
    ids = tokenizer("the goer ing" * 300, add_special_tokens=False)["input_ids"][:1000]
    if kind == "broken":  # bytes that never become a character
        names = tokenizer.convert_tokens_to_ids(["<0xFF>", "ÿ"])
        broken = [i for i in names if i not in (None, tokenizer.unk_token_id)] or ids
        ids = broken[:1] * 1000
    if kind == "special":
        ids = [ids[0], *[tokenizer.eos_token_id] * 998, ids[0]]
    counted = Counted(tokenizer)
    detokenizer = Detokenizer(counted, ids)
    for token_id in ids:
        detokenizer.push([token_id])
    assert counted.decoded < 14 * 1000


def test_many_tokens_at_once_are_decoded_once():
    counted = Counted(byte_level())
    ids = counted.tokenizer(TEXT * 20, verbose=False)["input_ids"]
    detokenizer = Detokenizer(counted, ids[:9])
    assert detokenizer.push(ids) == counted.tokenizer.decode(ids)
    assert counted.decoded < len(ids) + 30


@pytest.mark.parametrize("stop", [(), ("\n\n\n\n", "class Stack")])
def test_cost_in_microseconds(stop):
    tokenizer = byte_level()
    ids = tokenizer(TEXT * 20, verbose=False)["input_ids"]
    times = []
    for _ in range(5):
        detokenizer = Detokenizer(tokenizer, ids[:9], stop=stop)
        start = time.process_time()
        for token_id in ids:
            detokenizer.push([token_id])
        times.append((time.process_time() - start) / len(ids) * 1e6)
    print(f"{sorted(times)[2]:.1f} µs a token, {len(stop)} stop strings")
    assert sorted(times)[2] < 200
