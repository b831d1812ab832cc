"""The texts of the goldens, and tokenizers trained on them, written as the hub's tokenizer.json files are."""

import copy
import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# ---------------------------------------------------------------------------------------------------- texts

LONG_TOKEN = "<|one_token_that_is_longer_than_fifty_characters_so_it_stays|>"

# Every text is longer than 50 characters after stripping, as the scripts' filter wants, so that the whole program
# can be run on the corpus too. The one-token text of the models that add a BOS is empty, hence filtered there.
TEXTS = [
    "The river rises in the hills of the north and runs for two hundred miles to the sea.",
    "In 1998 the company sold 12,345 units, 7 % more than the year before; nobody knew why it was so.",
    "Café naïve résumé — “quoted” and ‘single’… the price was 30 €, they're said, we'll see, I'VE DONE it.",
    "def main():\n    for i in range(10):\n\t\tprint(i)\n\n\n    return None  # the end   of it  \n",
    "Emoji 🙂🚀👩‍👩‍👧 and CJK 你好，世界。こんにちは 안녕하세요 and Cyrillic Привет мир and Arabic مرحبا.",
    "the the the the and and and of of of to to to in in in a a a is is is was was was the the",
    "Decomposed e\u0301 a\u0300 n\u0303 and ligature ﬁ, zero\u200bwidth, nbsp\u00a0here, tab\there and \r\n a line ending.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of light.",
    "He said that the hills and the sea were all that there was, and that the rest did not matter at all.",
]
LEADING_SPACE = " = The hills of the north = \n\n  They rise from the sea , and the rivers run from them @-@ slowly . \n"
INNER_SPECIAL = "one of them{eos}the other{bos} and a third one, which is there to make the text longer than fifty."

TRAINING = TEXTS + [
    "the river and the sea, the hills and the north, the times and the age, that is what it was about",
    "range return print for in main while there, other, another, their, then, them, these, those",
    "company unit year before after price season light wisdom belief said matter rest slow slowly rivers run",
    "1998 1998 1998 12,345 12,345 199 345 2019 2019",  # numbers of several digits: Llama-3 groups three, Qwen2 none
]

# ----------------------------------------------------------------------------------------------- tokenizers

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def added(token_id, content, special=True):
    return {
        "id": token_id, "content": content, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": special,
    }  # fmt: skip


def byte_level(regex, vocab_size, specials):
    """Byte-level BPE as Qwen2 and Llama-3 ship it. The added tokens come after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    out = json.loads(tokenizer.to_str())
    first = len(out["model"]["vocab"])
    out["added_tokens"] = [added(first + i, s) for i, s in enumerate(specials)]
    return out


def qwen2_tokenizer():
    out = byte_level(QWEN2_REGEX, 400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", LONG_TOKEN])
    out["normalizer"] = {"type": "NFC"}
    out["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    out["model"]["merges"] = [" ".join(pair) for pair in out["model"]["merges"]]  # as files of before 2024 have them
    return out


def llama3_tokenizer():
    out = byte_level(LLAMA3_REGEX, 410, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    out["model"]["ignore_merges"] = True
    byte_post = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    out["post_processor"] = {
        "type": "Sequence", "processors": [byte_post, template(out, "<|begin_of_text|>")],
    }  # fmt: skip
    return out


def template(tokenizer, bos=None, eos=None):
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (bos, eos) if t}

    def piece(sequence, type_id):
        out = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        out.append({"Sequence": {"id": sequence, "type_id": type_id}})
        return out + ([{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else [])

    return {
        "type": "TemplateProcessing", "single": piece("A", 0), "pair": piece("A", 0) + piece("B", 1),
        "special_tokens": special,
    }  # fmt: skip


PREPEND_REPLACE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def sentencepiece(vocab_size, unk="<unk>", bos="<s>", eos="</s>", extra=(), metaspace=False):
    """BPE over ▁ words with byte fallback, as converted SentencePiece models ship it."""
    head = [unk, bos, eos, *extra] + [f"<0x{b:02X}>" for b in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=head, show_progress=False)
    known = ["".join(c for c in text if c.isascii() or c in "éèà—“”") for text in TRAINING]  # the rest falls to bytes
    learner.train_from_iterator(known, trainer)
    learnt = json.loads(learner.to_str())["model"]
    out = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(i, t) for i, t in enumerate([unk, bos, eos, *extra])],
        "normalizer": copy.deepcopy(PREPEND_REPLACE), "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": learnt["vocab"], "merges": [" ".join(pair) for pair in learnt["merges"]],
        },
    }  # fmt: skip
    if metaspace:  # as transformers 5 writes it
        out["normalizer"] = None
        out["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        out["model"]["merges"] = learnt["merges"]
    out["post_processor"] = template(out, bos)
    return out


def decoder_table(tokenizer):
    """tokenizer_config.json's added_tokens_decoder, as transformers 4 wrote it."""
    return {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}


def llama_tokenizer_config(tokenizer, **more):
    unk, bos, eos = (t["content"] for t in tokenizer["added_tokens"][:3])
    base = {
        "added_tokens_decoder": decoder_table(tokenizer), "bos_token": bos, "clean_up_tokenization_spaces": False,
        "eos_token": eos, "model_max_length": 1000000000000000019884624838656, "pad_token": None,
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": unk,
        "use_default_system_prompt": False,
    }  # fmt: skip
    return base | more


def vocab_size(tokenizer):
    return 1 + max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])


def one_token_in_the_middle(texts, token):
    return [*texts[:2], token, *texts[2:]]


def gemma_tokenizer(vocab_size):
    """Gemma's: spaces become ▁ and none is put before the text; <bos> by a template; pieces that are added tokens, though
    not special ones ("▁▁" as well, which no text holds: added tokens are looked for before spaces become ▁)."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    out = sentencepiece(vocab_size, *special[:3], extra=(*special[3:], "\n\n", "▁▁"))
    for token in out["added_tokens"][len(special) :]:
        token["special"] = False
    out["normalizer"] = PREPEND_REPLACE["normalizers"][1]
    out["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
    }  # fmt: skip
    out["decoder"]["decoders"].pop()  # no space to strip
    out["model"]["unk_token"] = "<unk>"
    out["post_processor"] = template(out, "<bos>")
    return out


def gemma_tokenizer_config(tokenizer, **more):
    base = {
        "add_bos_token": True, "add_eos_token": False, "added_tokens_decoder": decoder_table(tokenizer),
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"], "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False, "eos_token": "<eos>",
        "model_max_length": 1000000000000000019884624838656, "pad_token": "<pad>", "sp_model_kwargs": {},
        "spaces_between_special_tokens": False, "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }  # fmt: skip
    return base | more
