"""Which conversation template a model is trained with: a named one, or the model's own."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from lora_llava.core.errors import UserError
from lora_llava.data.conversation import EncodingError
from lora_llava.data.templates.chat_template import AUTO, ChatTemplate, own_template
from lora_llava.data.templates.named_templates import TEMPLATES, chat_template, get_template
from lora_llava.data.templates.spans import AnyTemplate, fit_template

_TURNS = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
_VICUNA = "vicuna_v1"


def resolve_template(
    name: str, system: str | None, tokenizer: PreTrainedTokenizerBase, text: str | None, language_model: str
) -> AnyTemplate:
    """Return the template that a recipe asks for.

    `auto` is the model's own chat template. A Llama without a usable one, such as Vicuna or LLaVA-1.5, gets
    `vicuna_v1`, with which LLaVA trained them; other models need a name.

    Args:
        name: `data.template` of the recipe.
        system: `data.system_prompt` of the recipe.
        tokenizer: The model's tokenizer, which knows `<image>`.
        text: The chat template in the model's folder, if it has one.
        language_model: The language model's `model_type`.

    Returns:
        The template, fitted to the tokenizer.

    Raises:
        UserError: If the name is unknown, or the model has no chat template that can be trained.
    """
    if name != AUTO:
        return fit_template(get_template(name, system), tokenizer)
    known = recognise_template(text, tokenizer) if text else None
    if known is not None and system is None:
        return known
    vicuna = language_model == "llama" and tokenizer.eos_token == TEMPLATES[_VICUNA].stop
    if not text:
        if vicuna:
            return fit_template(get_template(_VICUNA, system), tokenizer)
        raise UserError(
            "data.template is auto, but the language model has no chat template; name the one that it was trained "
            f"with: {', '.join(TEMPLATES)}"
        )
    try:
        return own_template(tokenizer, text, system)
    except UserError:
        if not vicuna:
            raise
        return fit_template(get_template(_VICUNA, system), tokenizer)


def recognise_template(text: str, tokenizer: PreTrainedTokenizerBase) -> AnyTemplate | None:
    """Return the template of `TEMPLATES` that writes what a chat template writes, its default system text included.

    Args:
        text: The chat template's Jinja text.
        tokenizer: The model's tokenizer.

    Returns:
        The template, fitted to the tokenizer; None if there is none.
    """
    written = _written(text)
    if not any(written):
        return None
    for template in TEMPLATES.values():
        fitted = fit_template(template, tokenizer)
        if _written(chat_template(fitted)) == written:
            return fitted
    return None


def _written(text: str) -> tuple[str, ...]:
    """Render a conversation with and without a system text; "" where the template refuses it."""
    template = ChatTemplate(text, (("bos_token", "<s>"), ("eos_token", "</s>")), "")
    found = []
    for turns in (_TURNS, _TURNS[1:]):
        try:
            found.append(template.render(turns, True))
        except EncodingError:
            found.append("")
    return tuple(found)
