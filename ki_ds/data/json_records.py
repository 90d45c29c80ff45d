"""Records of a JSON file, whichever way they are put: a line each, one after another, in an array, in an object.

A file may be larger than memory as long as its records are not; of an object that holds a list the whole.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ki_ds.errors import UserError

_BLOCK_CHARACTERS = 1 << 20
_BLANK = re.compile(r"[ \t\r\n]*")
_TOKEN_CHARACTERS = 16  # an error so near the end of what was read may be due to a token that goes on


class _Values:
    """The values of a file one by one, without those brackets and commas that make an array of them."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._place = 0
        self._lines_before = 0
        self._decode = json.JSONDecoder(parse_int=float).raw_decode  # float: a number may have any length

    def __iter__(self) -> Iterator[Any]:
        in_array = False
        while character := self._next_character():
            if character == "[" and not in_array:
                in_array = True
                self._place += 1
                if self._next_character() != "]":
                    yield self._value()
            elif character == "," and in_array:
                self._place += 1
                self._next_character()
                yield self._value()
            elif character == "]" and in_array:
                in_array = False
                self._place += 1
            elif in_array:
                raise self.error("is not JSON (expecting ',' or ']'); mend or remove that line")
            else:
                yield self._value()
        if in_array:
            raise self.error("is not JSON (the array does not end); it is cut: fetch it again")

    def error(self, fault: str) -> UserError:
        """`fault` with the line that reading has come to."""
        line = self._lines_before + self._text.count("\n", 0, self._place) + 1
        return UserError(f"{self._path} line {line:,} {fault}")

    def _next_character(self) -> str:
        """The first character that is not blank, from which the next value is read; "" at the end of the file."""
        while True:
            match = _BLANK.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text):
                return self._text[self._place]
            self._lines_before += self._text.count("\n")
            self._text, self._place = self._file.readline(_BLOCK_CHARACTERS), 0
            if not self._text:
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, self._place = self._decode(self._text, self._place)
                return value
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _TOKEN_CHARACTERS
                if not (goes_on and self._more()):
                    place = f"{error.msg}, {error.pos - self._place:,} characters on"
                    raise self.error(f"is not JSON ({place}); mend or remove that line") from None
            except RecursionError:
                raise self.error("holds JSON nested deeper than can be read; flatten or remove that line") from None

    def _more(self) -> bool:
        """Read on behind a value that goes on, twice as much each time; False at the end of the file."""
        self._lines_before += self._text.count("\n", 0, self._place)
        rest = self._text[self._place :]
        block = self._file.read(max(len(rest), _BLOCK_CHARACTERS >> 4))
        self._text, self._place = rest + block, 0
        return bool(block)


def json_records(file: TextIO, path: Path, text_key: str) -> Iterator[dict[str, Any]]:
    """The objects with a text under `text_key`. UserError, one line, names the line: no JSON, or no text there."""
    values = _Values(file, path)
    for value in values:
        for record in _listed(value, text_key) or [value]:
            if not (isinstance(record, dict) and isinstance(record.get(text_key), str)):
                raise values.error(f"has no text under {text_key!r}; give each record that key, or name another key")
            yield record


def _listed(value: Any, text_key: str) -> list[Any]:
    """The records of an object that has no text of its own but one list of them, such as {"data": [...]}."""
    if not isinstance(value, dict) or text_key in value:
        return []
    lists = [part for part in value.values() if is_record_list(part) and text_key in part[0]]
    return lists[0] if len(lists) == 1 else []


def is_record_list(value: Any) -> bool:
    """Whether it is a list that begins with an object."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
