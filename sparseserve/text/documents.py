"""What a text is made of: documents, conversations, and the files they were read from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sparseserve.errors import CalibrationError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class TextFile:
    """One text that was read: its name and the SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a chat, as its file has them; they become text by a model's template.

    ``place`` says where they stand, for messages of errors.
    """

    place: str
    messages: tuple[Mapping[str, object], ...]

    def __str__(self) -> str:
        """Return the messages as JSON; what it lacks, such as dates, as Python writes it."""
        messages = [dict(message) for message in self.messages]
        return json.dumps(messages, sort_keys=True, default=str)

    def rendered(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the text that the model of ``tokenizer`` reads for this chat.

        Raises:
            CalibrationError: There is no template, or it refuses these messages.
        """
        if not tokenizer.chat_template:
            raise CalibrationError(
                f"{self.place} holds chat messages, but the model's tokenizer has no chat template "
                "to render them with: name a column of text with --text-column, or take the "
                "tokenizer of the model's chat version"
            )
        messages = [dict(message) for message in self.messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # a template is a program of the model's and may fail anyhow
            raise CalibrationError(
                f"{self.place} cannot be rendered with the model's chat template: "
                f"{first_line(error)}"
            ) from error
        return str(text)


Document: TypeAlias = str | Conversation


@dataclass(frozen=True, slots=True)
class TextSource:
    """Documents, and the files they were read from.

    ``skipped`` counts the rows of its tables that held no text (null).
    """

    name: str
    documents: tuple[Document, ...]
    files: tuple[TextFile, ...]
    skipped: int = 0

    def __post_init__(self) -> None:
        """Refuse a source without a word in it."""
        if not any(str(document).strip() for document in self.documents):
            raise CalibrationError(f"{self.name} is empty: give a text with words in it")

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return all documents, joined by blank lines, but chats as the template ends them.

        Raises:
            CalibrationError: A conversation cannot be rendered for the model of ``tokenizer``.
        """
        pieces = []
        for document, following in zip(self.documents, (*self.documents[1:], None), strict=True):
            chat = isinstance(document, Conversation)
            pieces.append(
                document.rendered(tokenizer) if isinstance(document, Conversation) else document
            )
            if following is not None and not (chat and isinstance(following, Conversation)):
                pieces.append(DOCUMENT_SEPARATOR)
        return "".join(pieces)


def require_characters(place: str, text: str) -> str:
    """Return ``text`` if every character of it is one.

    Raises:
        CalibrationError: It holds half of a surrogate pair, as careless JSON does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{place} holds {text[error.start]!a}, which is half of a surrogate pair and no "
            "character: remove it, or write the pair whole"
        ) from error
    return text


def conversation(place: str, value: object) -> Conversation:
    """Check the messages of a chat.

    Raises:
        CalibrationError: They are not objects with a role and a content.
    """
    if not isinstance(value, list) or not value:
        raise CalibrationError(f"{place} is no list of messages")
    found = Conversation(place, tuple(_messages(place, value)))
    for text in _strings(value):
        require_characters(place, text)
    return found


def _messages(place: str, value: list[object]) -> Iterator[Mapping[str, object]]:
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CalibrationError(
                f'{place}: message {number} is no object with a "role": conversations are lists '
                'of {"role": ..., "content": ...}'
            )
        # A table fills in null where a message lacks what another has.
        kept = {str(key): item for key, item in message.items() if item is not None}
        if len(kept) < 2:
            raise CalibrationError(f'{place}: message {number} has no "content"')
        yield kept


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
