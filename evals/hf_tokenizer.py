"""A model's tokenizer as files that AutoTokenizer loads offline: tokenizer.json and its settings.

From a tiktoken file (its ranks say which pairs merge), from a tokenizer.json that is there already,
or for bytes from nothing. `<|endoftext|>` is bos, eos and pad, and opens every text unless
add_special_tokens=False: every document was trained behind it.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import train_gpt as T
from data import encode
from evals import sample

END_OF_TEXT = "<|endoftext|>"


def load(meta: dict, name: str = "") -> Tokenizer:
    """The tokenizer of a checkpoint with this meta.json. `name`: a tiktoken file, a tokenizer.json,
    or a folder with one of the two; needed where the vocabulary is neither bytes nor to be fetched.
    InputError if it is bad, or of another size."""
    path, size = Path(name), int(meta["config"]["vocab"])
    file = path / "tokenizer.json" if path.is_dir() else path
    if name and file.suffix == ".json" and file.is_file():
        tokenizer = from_json(file)
    else:
        ours = sample.tokenizer_of(meta, name)
        tokenizer = of_bytes() if ours.ranks is None else from_ranks(ours)
    if tokenizer.get_vocab_size() != size:
        raise T.InputError(
            f"--tokenizer {name} has {tokenizer.get_vocab_size():,} tokens, the model {size:,}"
        )
    return opening_with_end_of_text(tokenizer)


def from_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing narrower
        raise T.InputError(f"{file} is no tokenizer.json: {e}") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise T.InputError(f"{file} has no {END_OF_TEXT}, which opens a document")
    return tokenizer


def of_bytes() -> Tokenizer:
    """Token = byte; end-of-text 256."""
    letters = letter_of_byte()
    model = models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[])
    return byte_level(model)


def from_ranks(tokenizer: encode.Tokenizer) -> Tokenizer:
    """Byte-pair encoding with GPT-2's rule for splitting words, end-of-text last."""
    letters = letter_of_byte()

    def text(piece: bytes) -> str:
        return "".join(letters[b] for b in piece)

    vocab = {text(piece): rank for piece, rank in tokenizer.ranks.items()}
    merges = [(text(a), text(b)) for a, b in merged_pairs(tokenizer.ranks)]
    return byte_level(models.BPE(vocab=vocab, merges=merges))


def merged_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges behind a tiktoken vocabulary, in order: a token's own merge joins the two parts
    that all earlier merges leave of its bytes. InputError where they leave more."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            found = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(found)), key=found.__getitem__)
            if found[at] >= rank:
                raise T.InputError(f"--tokenizer: token {rank} is no merge of two earlier tokens")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append(tuple(parts))
    return pairs


def letter_of_byte() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the rest in order for what
    begins at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return tokenizer


def opening_with_end_of_text(tokenizer: Tokenizer) -> Tokenizer:
    eot = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, eot)],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json. Padding is on the left, as generation needs it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END_OF_TEXT)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": True,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
