"""Chat templates in the published ones' style, wherever a checkpoint keeps them: as transformers, to the id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from jinja2 import TemplateError
from published_tokenizers import write_tokenizer
from transformers import PreTrainedTokenizerFast

from superinfer.errors import InvalidRequestError, ModelLoadError
from superinfer.runtime.tokenization import Tokenizer

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception("Only single tool-calls at once!") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'+ message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' '  + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = """{{- bos_token }}
{%- set ns = namespace(users=0) %}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- set ns.users = ns.users + 1 %}
        {%- if tools is defined and tools and loop.last %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": CHATML}

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city <é>": {}}}}}]
CALL = {"type": "function", "id": "123456789", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CHATS = [
    [{"role": "user", "content": "  hi there "}],
    [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "ok 日本 😀 "},
        {"role": "user", "content": "<|im_end|> [INST] x </s> y"},
    ],
    [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
]


def place(folder: Path, kind: str, where: str) -> None:
    """Write the tokenizer with its template, one for tools beside it where there is room for several."""
    template = TEMPLATES[kind]
    if where == "config":
        write_tokenizer(folder, kind, chat_template=template)
    elif where == "list":
        with_tools = {"name": "tool_use", "template": "TOOLS" + template}
        write_tokenizer(folder, kind, chat_template=[{"name": "default", "template": template}, with_tools])
    elif where == "dict":
        write_tokenizer(folder, kind, chat_template={"default": template, "tool_use": "TOOLS" + template})
    else:
        write_tokenizer(folder, kind, chat_template="an older one")
        (folder / "chat_template.jinja").write_text(template)
    if where == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS" + template)


@pytest.mark.parametrize("where", ["config", "list", "dict", "jinja", "folder"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_rendered_chat_is_that_of_transformers_to_the_id(tmp_path, kind, where):
    place(tmp_path, kind, where)
    ours, hf = Tokenizer(str(tmp_path)), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rendered = 0
    for chat in CHATS:
        for tools in (None, TOOLS):
            for prompt in (True, False):
                try:
                    expected = hf.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt)["input_ids"]
                except TemplateError:
                    with pytest.raises(InvalidRequestError, match="the chat template refused these messages"):
                        ours.render_chat(chat, tools=tools, add_generation_prompt=prompt)
                    continue
                text = ours.render_chat(chat, tools=tools, add_generation_prompt=prompt)
                assert ours.encode(text, special=False) == expected
                rendered += 1
    assert rendered >= 8
    assert TEMPLATES[kind] in ours.chat_template


def test_a_template_in_the_file_of_processors_is_found(tmp_path):
    write_tokenizer(tmp_path, "qwen")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    chat = [{"role": "user", "content": "hi"}]
    assert Tokenizer(str(tmp_path)).render_chat(chat) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"chat_template\.json holds no chat template.*`chat_template`"):
        Tokenizer(str(tmp_path))
