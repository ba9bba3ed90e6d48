"""Text to tokens and back: tokenizer.json through ``tokenizers``, chat templates where present."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxquant.arguments import token_ids
from jaxquant.errors import ConfigError, FormatError

MAX_TOKENIZER_BYTES = 128 << 20
MAX_BRACKETS = 8_000_000
MAX_SETTINGS_BYTES = 8 << 20
MAX_SETTINGS_VALUES = 200_000


class Tokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        backend: a ``tokenizers.Tokenizer``.
        chat_template: Jinja source of the checkpoint's chat format, or None.
        special: names of special tokens that templates may use (``bos_token`` ...).
    """

    def __init__(
        self,
        backend: Any,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special = dict(special or {})

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read ``tokenizer.json`` and, where they exist, the template and special tokens beside it.

        Raises:
            FormatError: no tokenizer.json, or a file that cannot be parsed.
        """
        # Imported late: the command line's --help must not pay for it.
        import tokenizers

        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FormatError(str(folder), "no tokenizer.json", "text prompts need a tokenizer")
        text = _text(file, MAX_TOKENIZER_BYTES)
        if text.count("{") + text.count("[") > MAX_BRACKETS:
            raise FormatError(str(file), f"over {MAX_BRACKETS} lists and objects", "a vocabulary")
        with _failures(str(file), "not a tokenizer"):
            backend = tokenizers.Tokenizer.from_str(text)
        settings = _read_json(folder / "tokenizer_config.json")
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = [entry for entry in template if isinstance(entry, dict)]
            template = next((e.get("template") for e in named if e.get("name") == "default"), None)
        separate = folder / "chat_template.jinja"
        if separate.is_file():
            template = _text(separate, MAX_SETTINGS_BYTES)
        if template is not None and not isinstance(template, str):
            where = f"{folder / 'tokenizer_config.json'}: chat_template"
            raise FormatError(where, repr(template)[:80], "a text, or a list of named texts")
        special: dict[str, str] = {}
        for name, value in settings.items():
            if not name.endswith("_token") or value is None or isinstance(value, bool):
                continue
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str):
                where = f"{folder / 'tokenizer_config.json'}: {name}"
                raise FormatError(where, repr(value)[:80], "a text, or an object with its content")
            special[name] = content
        return cls(backend, template, special)

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` and what else :meth:`from_directory` reads into a directory."""
        folder = Path(path)
        if not folder.is_dir():
            raise FormatError(str(folder), "no such directory", "a directory to write into")
        self.backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = dict(self.special)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a text.

        Raises:
            FormatError: the vocabulary has no token for a part of the text, nor for unknown parts.
            ConfigError: no text.
        """
        if not isinstance(text, str):
            raise ConfigError("text", type(text).__name__, "one text is needed")
        with _failures("tokenizer.json", "a text cannot be encoded"):
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out.

        Raises:
            ConfigError: no list of token ids.
        """
        # A model's vocabulary may be padded past the tokenizer's, which leaves such ids out.
        known = token_ids("ids", ids, 2**31)
        if known.ndim != 1:
            raise ConfigError("ids", f"shape {known.shape}", "a list of token ids is needed")
        return self.backend.decode(known.tolist(), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Prompt text for a conversation, ending where the assistant speaks.

        The template writes its own special tokens: encode the result with ``special=False``.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
        Raises:
            ConfigError: the checkpoint has no template, jinja2 is missing, or the template refuses
                the messages.
        """
        if self.chat_template is None:
            raise ConfigError("chat", "this checkpoint has no chat template", "use plain prompts")
        try:
            jinja2 = importlib.import_module("jinja2")
            chat_template = importlib.import_module("jaxquant.chat_template")
        except ImportError as error:
            action = "pip install jinja2"
            raise ConfigError(
                "chat", "jinja2 is not installed", "it renders templates", action
            ) from error
        variables = {"messages": list(messages), "add_generation_prompt": True, **self.special}
        try:
            return chat_template.render(self.chat_template, variables)
        except jinja2.TemplateError as error:
            raise ConfigError("chat", f"the template failed ({error})"[:2000]) from error


@contextlib.contextmanager
def _failures(where: str, found: str) -> Iterator[None]:
    """Turn the library's errors into ours: bare Exception, and panics, which are no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | TypeError):
            raise
        raise FormatError(where, f"{found} ({error})"[:300]) from None


def _text(file: Path, limit: int) -> str:
    """The text of a file of at most ``limit`` bytes."""
    try:
        size = file.stat().st_size
        if size > limit:
            raise FormatError(str(file), f"{size} bytes", f"at most {limit}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(str(file), error.strerror or str(error), "a readable file") from None
    except UnicodeDecodeError as error:
        raise FormatError(str(file), f"not UTF-8 ({error})", "a text in UTF-8") from None
    if text.startswith("version https://git-lfs"):
        action = "run 'git lfs pull' in the checkpoint's folder"
        raise FormatError(str(file), "a Git LFS pointer", "the file itself", action)
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice in one object")
    return made


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    text = _text(file, MAX_SETTINGS_BYTES)
    if sum(map(text.count, ",[{")) > MAX_SETTINGS_VALUES:
        raise FormatError(str(file), f"over {MAX_SETTINGS_VALUES} values", "settings are few")
    try:
        settings = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(str(file), f"not JSON ({error})"[:300]) from None
    if not isinstance(settings, dict):
        raise FormatError(str(file), f"a JSON {type(settings).__name__}", "an object")
    return settings
