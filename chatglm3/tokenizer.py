"""ChatGLM3's tokenizer: SentencePiece for text, and control ids that no text can spell. Needs no torch."""

import codecs
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from chatglm3.errors import ModelError
from chatglm3.folder import model_folder

CONTROL_TOKENS = (
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
"""Their ids follow the SentencePiece vocabulary in this order."""


def load_tokenizer(folder: str | Path) -> "ChatGlmTokenizer":
    """The tokenizer of a model folder: its `tokenizer.model`. ModelError if that is missing or damaged."""
    file = model_folder(folder) / "tokenizer.model"
    try:
        return ChatGlmTokenizer(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: copy it from the ChatGLM3 folder that the model comes from") from None
    except RuntimeError:
        raise ModelError(f"{file} is not a SentencePiece model: download ChatGLM3's own again") from None


class ChatGlmTokenizer:
    """Text to ids and back, exactly as the official tokenizer does it."""

    def __init__(self, model: bytes) -> None:
        """`model` is the content of a tokenizer.model. RuntimeError if it is none."""
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """sha256 of tokenizer.model: equal fingerprints mean equal ids."""
        self._sentencepiece = SentencePieceProcessor(model_proto=model)
        self._num_pieces: int = self._sentencepiece.vocab_size()
        self._pieces: dict[int, str | bytes] = {}  # asking SentencePiece takes several times as long
        self._control_ids = {token: self._num_pieces + index for index, token in enumerate(CONTROL_TOKENS)}
        self.vocab_size = self._num_pieces + len(CONTROL_TOKENS)
        self.pad_id = 0
        self.eos_id = 2
        self.stop_ids = (self.eos_id, self.control_id("<|user|>"), self.control_id("<|observation|>"))
        """A reply ends at any of these."""
        self.prefix_ids = [self.control_id("[gMASK]"), self.control_id("sop")]
        """Every input starts with these."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without prefix. "sop", "<|user|>" and "</s>" in it are text like any other."""
        try:
            ids: list[int] = self._sentencepiece.encode(text)
        except RuntimeError:
            raise ModelError(f"text is not valid Unicode near {ascii(text)[:60]}: remove lone surrogates") from None
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: control ids by name; without padding, `<s>`, `</s>` and ids past the vocabulary."""
        decoder = TextDecoder(self)
        return decoder.push(ids) + decoder.finish()

    def control_id(self, token: str) -> int:
        """Id of a control token. ModelError if there is none of that name."""
        if token not in self._control_ids:
            raise ModelError(f"{token!r} is not a control token: use one of {', '.join(CONTROL_TOKENS)}")
        return self._control_ids[token]

    def piece(self, token_id: int) -> str | bytes:
        """What one id stands for: text, in which "▁" is a space, or one byte of a character."""
        if not 0 <= token_id < self.vocab_size:
            return ""  # and is not kept: a caller may send any number of them
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._asked_piece(token_id)
        return piece

    def _asked_piece(self, token_id: int) -> str | bytes:
        if token_id >= self._num_pieces:
            return CONTROL_TOKENS[token_id - self._num_pieces]
        if token_id <= self.eos_id:
            return ""
        piece: str = self._sentencepiece.id_to_piece(token_id)
        return bytes.fromhex(piece[3:5]) if self._sentencepiece.is_byte(token_id) else piece

    def pad(self, rows: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
        """A batch of inputs, padded on the left: input_ids, attention_mask, position_ids (0 on padding)."""
        width = max(map(len, rows))
        gaps = [width - len(row) for row in rows]
        return {
            "input_ids": [[self.pad_id] * gap + list(row) for gap, row in zip(gaps, rows, strict=True)],
            "attention_mask": [[0] * gap + [1] * (width - gap) for gap in gaps],
            "position_ids": [[0] * gap + list(range(width - gap)) for gap in gaps],
        }


class TextDecoder:
    """Ids in, text out as soon as it is certain: half a character waits for its other bytes."""

    def __init__(self, tokenizer: ChatGlmTokenizer, is_start: bool = True) -> None:
        """`is_start`: the ids are a text of their own; otherwise they go on with one, and keep their first space."""
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="chatglm3.replace_each_byte")
        self._at_start = is_start

    def push(self, ids: Iterable[int]) -> str:
        """Text that these ids complete."""
        return "".join([self._push(self._tokenizer.piece(token_id)) for token_id in ids])

    def finish(self) -> str:
        """What is left: a replacement character for each byte of an unfinished character."""
        return self._characters.decode(b"", final=True)

    def _push(self, piece: str | bytes) -> str:
        if isinstance(piece, bytes):
            self._at_start = False
            return self._characters.decode(piece)
        text = self.finish()
        if self._at_start and piece:
            # Encoding puts a space before every text; it is not part of it.
            self._at_start = False
            piece = piece.removeprefix("▁")
        return text + piece.replace("▁", " ")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    # SentencePiece's way; Python's own "replace" puts one character for a run of bytes that belong together.
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("chatglm3.replace_each_byte", _replace_each_byte)
