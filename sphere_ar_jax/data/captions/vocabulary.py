"""Vocabularies: how a text becomes a row of numbers, and back.

The config's word `ar.vocabulary` chooses one:

  bytes       the bytes of a text
  FILE.txt    words, one in each line of the file
  FILE.json   a tokenizer of the library `tokenizers`, as Hugging Face's models have it; the extra
              `text` installs the library

Dimensions:
  T  numbers of a caption; shorter captions are filled up with `END`
  V  size of a vocabulary, `END` included
"""

import functools
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from sphere_ar_jax.data.captions import files as texts
from sphere_ar_jax.runtime import files
from sphere_ar_jax.runtime.console import UserError, first_line, printable

_WORDS = '.txt'  # how the name of a list of words ends
_UNKNOWN = 'which the tokenizer does not know'
END = 0  # ends a caption, and fills it up


class Vocabulary(Protocol):
    """The numbers that stand for the pieces of a text.

    Attributes:
      size: V; numbers are 1 … V − 1, and END.
    """

    size: int

    def encode(self, text: str) -> list[int]:
        """Turns a text into numbers, without END.

        Raises:
          UserError: the vocabulary has no numbers for the text.
        """

    def decode(self, numbers: Iterable[int]) -> str:
        """Turns numbers up to the first END into a text."""


def _until_end(numbers: Iterable[int]) -> list[int]:
    """The numbers before the first END."""
    found = [int(n) for n in numbers]
    return found[: found.index(END)] if END in found else found


def _shown(text: str) -> str:
    """A text for messages: in quotes, printable and short."""
    return f"'{printable(text, 60)}'"


class Bytes:
    """The bytes of a text's UTF-8; byte b has the number b + 1.

    Any text comes back as it was, in Unicode's form NFC.
    """

    size = 257

    def encode(self, text: str) -> list[int]:
        """Turns a text into its bytes plus 1; see `Vocabulary`."""
        try:
            content = unicodedata.normalize('NFC', text).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{_shown(text)} is no text: character {error.start + 1} is half of a surrogate '
                'pair'
            ) from None
        return [byte + 1 for byte in content]

    def decode(self, numbers: Iterable[int]) -> str:
        """Turns numbers into a text; bytes that are no UTF-8 become U+FFFD."""
        return bytes(n - 1 for n in _until_end(numbers)).decode(errors='replace')


class Words:
    """The words of a list; word i of the list, from 0 on, has the number i + 1.

    A text is split at its spaces, and comes back with one space between words, in Unicode's form
    NFC.
    """

    def __init__(self, path: str):
        """Reads a list of words, one in each line.

        Raises:
          UserError: there is no such file, or it is no list of different words.
        """
        if not epath.Path(path).is_file():
            raise UserError(f'ar.vocabulary is {path}, but there is no such file')
        self._path = path
        lines = texts.lines(path)
        self._words = [unicodedata.normalize('NFC', line.strip()) for _, line in lines]
        for word in self._words:
            if len(word.split()) != 1:
                raise UserError(f'{path} has {_shown(word)}: write one word in each line')
        self._numbers = {word: i + 1 for i, word in enumerate(self._words)}
        if not self._words or len(self._numbers) < len(self._words):
            raise UserError(f'{path} is no list of words: it must have some, and each once')
        self.size = len(self._words) + 1

    def encode(self, text: str) -> list[int]:
        """Turns a text into the numbers of its words; see `Vocabulary`."""
        words = unicodedata.normalize('NFC', text).split()
        for word in words:
            if word not in self._numbers:
                raise UserError(
                    f'{_shown(text)} has {_shown(word)}, which the vocabulary does not know: use '
                    f'the words of {self._path}'
                )
        return [self._numbers[word] for word in words]

    def decode(self, numbers: Iterable[int]) -> str:
        """Turns numbers into a text; see `Vocabulary`."""
        return ' '.join(self._words[n - 1] for n in _until_end(numbers))


class TokenizerFile:
    """A tokenizer of the library `tokenizers`; its number n has the number n + 1.

    It adds no special tokens, and texts that hold one are refused. So are texts of which its model
    would leave something out. What comes back is what its decoder makes of the tokens.
    """

    def __init__(self, path: str):
        """Reads a tokenizer.json.

        Raises:
          UserError: the library is missing, or the file is no tokenizer.
        """
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f'ar.vocabulary={path} needs the library tokenizers: '
                "pip install 'sphere_ar_jax[text]'"
            ) from None
        if not epath.Path(path).is_file():
            raise UserError(
                f"ar.vocabulary is {path}: give 'bytes', or the path of a tokenizer.json or a .txt"
            )
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(epath.Path(path).read_text())
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f'{path} is no tokenizer: {first_line(error)}') from None
        # A tokenizer may cut texts and fill them up. Here `encode` does that, for all vocabularies.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Some are trained with merges left out at random (BPE dropout).
        if getattr(self._tokenizer.model, 'dropout', None) is not None:
            self._tokenizer.model.dropout = None
        self._model: dict[str, Any] = json.loads(self._tokenizer.to_str())['model']
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._refused = self._refused_numbers()
        # Numbers may have gaps.
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not numbers:
            raise UserError(f'{path} has no tokens: train the tokenizer first')
        self.size = max(numbers) + 2

    def _refused_numbers(self) -> dict[int, str]:
        """{number of a token that no text may have: what it is}."""
        refused = {
            number: 'which is a special token'
            for number, token in self._added.items()
            if token.special
        }
        unknown = self._model.get('unk_id')  # of Unigram; the other models name the token
        if unknown is None and self._model.get('unk_token') is not None:
            unknown = self._tokenizer.token_to_id(self._model['unk_token'])
        if unknown is not None:
            refused[unknown] = _UNKNOWN
        return refused

    def _left_out(self, text: str, encoding: Any) -> str:
        """A piece of a text of which the model leaves something out, '' where there is none."""
        tokenizer = self._tokenizer
        for part in self._parts(text, encoding):
            normal = tokenizer.normalizer.normalize_str(part) if tokenizer.normalizer else part
            pieces = [normal]
            if tokenizer.pre_tokenizer:
                pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
            for piece in pieces:
                covered = sum(stop - start for start, stop in self._offsets(piece))
                if covered < len(piece.encode()):
                    return piece
        return ''

    def _parts(self, text: str, encoding: Any) -> list[str]:
        """The parts of a text before, between and behind its added tokens."""
        parts = []
        begin = 0
        for number, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if number in self._added:
                parts.append(text[begin:start])
                begin = stop
        return [*parts, text[begin:]]

    def _offsets(self, piece: str) -> list[tuple[int, int]]:
        """Where the tokens of a piece of a text begin and end, in bytes."""
        return [token.offsets for token in self._tokenizer.model.tokenize(piece)]

    def encode(self, text: str) -> list[int]:
        """Turns a text into numbers; see `Vocabulary`."""
        try:
            found = self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain exceptions
            raise UserError(
                f'{_shown(text)} cannot be read by the tokenizer: {first_line(error)}'
            ) from None
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if number in self._refused:
                raise UserError(
                    f'{_shown(text)} has {_shown(text[start:stop])}, {self._refused[number]}'
                )
        left_out = self._left_out(text, found)
        if left_out:
            raise UserError(f'{_shown(text)} has {_shown(left_out)}, {_UNKNOWN}')
        if not found.ids:
            raise UserError(f'{_shown(text)} has nothing that the tokenizer keeps')
        return [n + 1 for n in found.ids]

    def decode(self, numbers: Iterable[int]) -> str:
        """Turns numbers into a text; see `Vocabulary`."""
        text = self._tokenizer.decode([n - 1 for n in _until_end(numbers)])
        suffix = self._model.get('end_of_word_suffix')
        # Some decoders leave it, as that of CLIP's tokenizer.
        return text.replace(suffix, ' ').rstrip(' ') if suffix else text


@functools.lru_cache(8)
def _opened(path: str, stamp: tuple[int, int] | None) -> Vocabulary:
    """The vocabulary in a file whose `files.stamp` is `stamp`."""
    del stamp  # A file that was changed has another one, and is read again.
    return Words(path) if path.endswith(_WORDS) else TokenizerFile(path)


def open_vocabulary(word: str) -> Vocabulary:
    """Opens the vocabulary that the config's `ar.vocabulary` names; a file once until it changes.

    Raises:
      UserError: see `Words` and `TokenizerFile`.
    """
    if word == 'bytes':
        return Bytes()
    path = os.path.expanduser(word)
    return _opened(path, files.stamp(path))


def _kept(word: str, workdir: str | os.PathLike[str]) -> epath.Path:
    """The file in which a run keeps the vocabulary: WORKDIR/vocabulary.txt or .json."""
    suffix = _WORDS if word.endswith(_WORDS) else '.json'
    return epath.Path(workdir, f'vocabulary{suffix}')


def keep(word: str, workdir: str) -> None:
    """Copies the file of a vocabulary into a workdir, so that the run can be moved alone.

    Args:
      word: the config's `ar.vocabulary`; of 'bytes' nothing is kept.
      workdir: the directory of the run.
    """
    kept = _kept(word, workdir)
    if word != 'bytes' and not kept.exists():
        files.write_bytes(kept, epath.Path(word).expanduser().read_bytes())


def are_same(one: str, other: str) -> bool:
    """Whether two values of `ar.vocabulary` are one vocabulary: the same word, or equal files."""
    if one == other or 'bytes' in (one, other):
        return one == other
    first, second = (epath.Path(word).expanduser().read_bytes() for word in (one, other))
    return first == second


def of_run(word: str, workdir: str | os.PathLike[str]) -> str:
    """What `ar.vocabulary` is for a run that may have been moved: the file that it keeps, if any.

    Args:
      word: the value in the run's config.json.
      workdir: the directory of the run.
    """
    kept = _kept(word, workdir)
    return os.fspath(kept) if word != 'bytes' and kept.exists() else word


def _filled(numbers: Sequence[int], length: int) -> np.ndarray:
    """Numbers as (T,) int32, filled up with END."""
    row = np.full(length, END, np.int32)
    row[: len(numbers)] = numbers
    return row


def check_prompt(text: str) -> None:
    """Raises UserError where a text that an image is to be drawn for is empty."""
    if not text.strip():
        raise UserError('a prompt is empty: say what the image shows')


def encode_prompt(text: str, vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Encodes a text that an image is drawn for.

    Args:
      text: the prompt. Spaces around it do not count.
      vocabulary: the model's vocabulary.
      length: T.

    Returns:
      (T,) int32.

    Raises:
      UserError: the prompt is empty or too long, or the vocabulary has no numbers for it.
    """
    check_prompt(text)
    numbers = vocabulary.encode(text.strip())
    if len(numbers) > length:
        raise UserError(
            f'the prompt {_shown(text)} is too long: it has {len(numbers)} tokens, and this model '
            f'reads {length}'
        )
    return _filled(numbers, length)


def describe_cut(texts: Sequence[str], vocabulary: Vocabulary, length: int) -> str:
    """Says how many captions are longer than what a model reads of them; '' where none is.

    Args:
      texts: some captions that the vocabulary has numbers for.
      vocabulary: the model's vocabulary.
      length: T.
    """
    lengths = [len(vocabulary.encode(text.strip())) for text in texts]
    cut = sum(n > length for n in lengths)
    if not cut:
        return ''
    return (
        f'{cut} of {len(texts)} captions that were looked at are cut off behind {length} tokens '
        f'(ar.text_tokens); the longest has {max(lengths)}'
    )


def _cut(numbers: list[int], length: int, are_bytes: bool) -> list[int]:
    """The first `length` numbers; a character of several bytes is not cut in two."""
    end = length
    while are_bytes and 0 < end < len(numbers) and (numbers[end] - 1) & 0xC0 == 0x80:
        end -= 1
    return numbers[:end]


class CaptionEncoder:
    """Encodes captions to train on. It is picklable, for worker processes."""

    def __init__(self, word: str, length: int):
        """Opens the vocabulary.

        Args:
          word: names the vocabulary, see `open_vocabulary`.
          length: T. What is beyond is cut off.

        Raises:
          UserError: see `open_vocabulary`.
        """
        self._word = word
        self._length = length
        self._vocabulary = open_vocabulary(word)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the vocabulary itself.
        return CaptionEncoder, (self._word, self._length)

    def __call__(self, text: str) -> np.ndarray:
        """Turns a caption into numbers (T,) int32. Spaces around it do not count.

        Raises:
          UserError: the vocabulary has no numbers for the caption.
        """
        numbers = self._vocabulary.encode(text.strip())
        cut = _cut(numbers, self._length, isinstance(self._vocabulary, Bytes))
        return _filled(cut, self._length)
