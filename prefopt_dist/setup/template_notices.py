"""Say what a person should know about the chat template before its rows are read."""

from __future__ import annotations

from typing import Any

from prefopt_dist.config import Config
from prefopt_dist.data.example import Message
from prefopt_dist.data.template import Template, template_name


def template_notices(config: Config, tokenizer: Any, template: Template) -> list[str]:
    """Return a line for each thing about the chat template that is not as most people expect it.

    Args:
        config: the configuration.
        tokenizer: of the model.
        template: what was found out about the tokenizer's template.
    """
    if template_name(tokenizer, config.data.template, config.data.chat_template) == "plain":
        return [
            "data: the tokenizer has no chat template, so turns get the plain one of this package "
            "('### user:' and '### assistant:' as headings); the export includes it"
        ]
    lead = _learnt_lead(template)
    if not lead:
        return []
    return [
        f"data: the chat template does not read add_generation_prompt, so each response begins with {lead!r}, which is "
        "learnt and counted as a part of it; to have it in the prompt, give a template that writes it where "
        "add_generation_prompt is set (data.chat_template)"
    ]


def _learnt_lead(template: Template) -> str:
    """Return the text before an answer that stands in the response for want of a generation prompt; "" where none."""
    lead = template.reply_lead or ""
    if template.mode == "none" or not lead.strip():
        return ""
    question, arguments = (Message("user", "a"),), dict(template.arguments)
    try:
        opened, asked = (template.apply(question, add, None, arguments) for add in (True, False))
    except Exception:  # a template is a program, and may refuse a conversation without an answer
        return ""
    return lead if opened == asked else ""
