"""The text that the GPT example is trained and measured on, and the tokens it is cut into.
CPython carries it in every installation: ``pydoc_data.topics``, what ``help("for")`` prints.
"""

import codecs
import hashlib
import platform
from collections.abc import Iterable
from pydoc_data.topics import topics as TOPICS

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
PYTHON_VERSION = platform.python_version()

# A run of this many words that occurs in two places is the same text, not a coincidence.
RUN = 12

SPHINX_WIDTH = 70


def text_digest() -> str:
    """Returns the sha256 of all topics, whose text differs between versions of Python."""
    digest = hashlib.sha256()
    for name in sorted(TOPICS):
        digest.update(f"{name}\0{TOPICS[name]}\0".encode())
    return digest.hexdigest()


def is_held_out(name: str) -> bool:
    """Says whether the topic called `name` is for measuring only (about one in ten is)."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def unwrap(text: str) -> str:
    """Puts the lines of each paragraph into one, as they were before Sphinx wrapped them.

    A line break is one of Sphinx's if the next word would not have fitted. Headings, code and
    tables keep their lines.
    """
    lines: list[str] = []
    previous = ""
    for line in text.split("\n"):
        word = line.split()[0] if line.strip() else ""
        indented_more = indentation(line) - indentation(previous)
        underline = set(word) <= set("*=-~^")
        fits = len(previous) + 1 + len(word) <= SPHINX_WIDTH or len(previous) > SPHINX_WIDTH
        # The lines after the first of a list item are indented by its bullet.
        if word and not underline and not fits and 0 <= indented_more <= len("10. "):
            split_at_hyphen = previous.endswith("-") and previous[-2].isalpha()
            lines[-1] += ("" if split_at_hyphen else " ") + line.strip()
        else:
            lines.append(line)
        previous = line
    return "\n".join(lines)


def held_out_documents() -> list[str]:
    """Returns the topics that are for measuring only, in alphabetical order."""
    return [unwrap(TOPICS[name]) for name in sorted(TOPICS) if is_held_out(name)]


def training_documents() -> list[str]:
    """Returns the text to train on, without anything that is also in the held-out topics.

    Topics repeat each other: "specialnames" holds all of "sequence-types". A paragraph is left
    out if it has a part in a run of `RUN` words that is in a held-out topic, or in a longer
    training topic. A topic that loses paragraphs falls apart into several documents.
    """
    seen: set[tuple[str, ...]] = set()
    for document in held_out_documents():
        seen.update(word_runs(document))
    names = [name for name in TOPICS if not is_held_out(name)]
    documents = []
    for name in sorted(names, key=lambda name: (-len(TOPICS[name]), name)):
        documents += _without_seen(unwrap(TOPICS[name]), seen)
        seen.update(word_runs(TOPICS[name]))
    return documents


def word_runs(document: str) -> Iterable[tuple[str, ...]]:
    """Yields every run of `RUN` consecutive words of `document`."""
    words = document.split()
    return (tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def _without_seen(document: str, seen: set[tuple[str, ...]]) -> list[str]:
    """Drops the paragraphs with a part in a run of `seen`; returns the stretches between them."""
    paragraphs = document.split("\n\n")
    paragraph_of_word = [p for p, text in enumerate(paragraphs) for _ in text.split()]
    dropped: set[int] = set()
    for i, run in enumerate(word_runs(document)):
        if run in seen:
            dropped.update(paragraph_of_word[i : i + RUN])
    stretches: list[list[str]] = [[]]
    for p, paragraph in enumerate(paragraphs):
        if p in dropped:
            stretches.append([])
        else:
            stretches[-1].append(paragraph)
    return ["\n\n".join(stretch) + "\n" for stretch in stretches if any(map(str.strip, stretch))]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE with GPT-2's pre-tokenisation, trained on `documents`.

    Every string can be encoded, because all 256 bytes are in the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: list[str], end: int | None = None
) -> np.ndarray:
    """Returns all documents as one int32 array, each with a token before and the last after.

    The token is `end`, or END_OF_TEXT.
    """
    end = tokenizer.token_to_id(END_OF_TEXT) if end is None else end
    ids = [end]
    for document in documents:
        ids += tokenizer.encode(document).ids
        ids.append(end)
    return np.array(ids, dtype=np.int32)


def windows(ids: np.ndarray, context: int) -> np.ndarray:
    """Cuts `ids` into consecutive windows, int32 (n, context + 1).

    A window's last token is the next one's first, so that every token but the first is predicted
    once. The rest at the end that does not fill a window is left out.
    """
    n = (len(ids) - 1) // context
    return np.stack([ids[i * context : (i + 1) * context + 1] for i in range(n)])


class StreamDecoder:
    """Turns byte-level BPE tokens into text one at a time.

    A character may be spread over several tokens; it comes out with the last of them. Bytes that
    are no UTF-8 come out as U+FFFD, and so does a number that the tokenizer does not know. Special
    tokens such as the end of the text come out as nothing.

    Raises:
        ValueError: the tokenizer's tokens are not bytes.

    Example:
        >>> decoder = StreamDecoder(tokenizer)
        >>> text = "".join(decoder.feed(i) for i in ids) + decoder.finish()
    """

    def __init__(self, tokenizer: Tokenizer):
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError("expected a byte-level tokenizer, whose decoder is ByteLevel")
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Returns the text that `token` completes, which may be empty."""
        if token in self._added:
            added = self._added[token]
            return self.finish() + ("" if added.special else added.content)
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return self.finish() + "\ufffd"
        return self._utf8.decode(bytes(_BYTE_OF_CHARACTER[c] for c in text))

    def finish(self) -> str:
        """Returns what an unfinished character leaves: "" or U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _byte_characters() -> dict[str, int]:
    """Returns GPT-2's naming of bytes: printable ones name themselves, the others 256, 257, …"""
    ranges = ("!~", "¡¬", "®ÿ")
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()
