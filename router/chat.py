"""A conversation as one text, by the model's own chat template."""

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvferry.common.errors import InvalidRequest
from kvferry.router.openai import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAID = "what the tool said"


class ChatTemplate:
    """The template of a tokenizer, which may have none."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._knows_developer = "developer" in str(tokenizer.chat_template)
        # What transformers or every template has a meaning for; a client's `chat_template` would run on this server.
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._taken = {*parameters, *tokenizer.special_tokens_map, "messages"}

    @property
    def exists(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render(self, conversation: Conversation) -> str:
        """Raises InvalidRequest."""
        if not self.exists:
            raise InvalidRequest("this model has no chat template; use /v1/completions", "messages")
        if taken := self._taken.intersection(conversation.template_fields):
            field = f"chat_template_kwargs.{min(taken)}"
            raise InvalidRequest(f"{field} is not for clients to set; leave it out", field)
        turns = [self._turn(message, f"messages[{i}]") for i, message in enumerate(conversation.messages)]
        return self._apply(turns, conversation.generation_prompt, conversation.continues, conversation.template_fields)

    def _turn(self, message: Message, path: str) -> dict[str, str]:
        """A `developer` is told to a template that does not know it as `system`, its older name, and a `function` to
        every one as `tool`, its newer name."""
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        if role in ("tool", "function") and not self._takes_tools:
            raise InvalidRequest(
                f"{path}.role is {role}, which this model's chat template does not take", f"{path}.role"
            )
        role = "tool" if role == "function" else role
        told = {"role": role, "content": message.content, "name": message.name, "tool_call_id": message.tool_call_id}
        return {name: value for name, value in told.items() if value is not None}

    @cached_property
    def _takes_tools(self) -> bool:
        """Whether what a tool says arrives in the text. Templates refuse roles that they do not know, or leave them
        out."""
        turns = [{"role": "user", "content": "a"}, {"role": "tool", "content": SAID, "tool_call_id": "a12345678"}]
        try:
            return SAID in self._apply(turns)
        except InvalidRequest:
            return False

    def _apply(
        self,
        turns: list[dict[str, str]],
        generation_prompt: bool = True,
        continues: bool = False,
        fields: Mapping[str, Any] | None = None,
    ) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                continue_final_message=continues,
                **(fields or {}),
            )
        except Exception as error:  # a template is a program, and its input is the client's
            said = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidRequest(f"the model's chat template refuses the messages: {said}", "messages") from error
