"""Text to tokens and back: tokenizer.json through ``tokenizers``, chat templates where present."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxquant.errors import ConfigError, FormatError


class Tokenizer:
    """The tokenizer of a checkpoint.

    Attributes:
        chat_template: Jinja source of the checkpoint's chat format, or None.
        special: names of special tokens that templates may use (``bos_token`` ...).
    """

    def __init__(
        self,
        backend: Any,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        self._backend = backend
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
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises bare Exception for bad files.
            raise FormatError(str(file), f"not a tokenizer ({error})") from error
        settings = _read_json(folder / "tokenizer_config.json")
        template = settings.get("chat_template")
        if isinstance(template, list):
            named = {entry.get("name"): entry.get("template") for entry in template}
            template = named.get("default")
        separate = folder / "chat_template.jinja"
        if separate.is_file():
            template = separate.read_text(encoding="utf-8")
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        return cls(backend, template, special)

    def save(self, path: str | Path) -> None:
        """Write ``tokenizer.json`` and what else :meth:`from_directory` reads into a directory."""
        folder = Path(path)
        self._backend.save(str(folder / "tokenizer.json"))
        settings: dict[str, Any] = dict(self.special)
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around a text."""
        return self._backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

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
            sandbox = importlib.import_module("jinja2.sandbox")
        except ImportError as error:
            action = "pip install jinja2"
            raise ConfigError(
                "chat", "jinja2 is not installed", "it renders templates", action
            ) from error

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        # Templates come with checkpoints, so they run in a sandbox.
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=True, **self.special
            )
        except jinja2.TemplateError as error:
            raise ConfigError("chat", f"the template failed ({error})") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(str(file), f"not JSON ({error})") from error
