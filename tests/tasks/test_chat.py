"""Chats are what a tokenizer's own template writes, and a template's faults are one message."""

import itertools
import sys
from types import SimpleNamespace

import pytest

from lensjax.errors import InputError
from lensjax.tasks import CHAT, Example, chat, encode
from support import tokenizer_kinds

# How published templates write a dialogue, each reduced to that.
TEMPLATES = {
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no-end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    # It asks with a word that the dialogue does not have, as those of models that think aloud do.
    "taken-back": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}",
}
SAMPLES = (("rear", "bring up"), ("12 + 345", "357"), ("你好", "世界。"), ("the word", "0 and two"))


@pytest.fixture(scope="module", params=["gpt2", "bytes-bos", "llama", "llama-prepending", "gemma", "gguf-llama"])
def named(request, tmp_path_factory):
    return request.param, tokenizer_kinds.DECODERS[request.param](tmp_path_factory.mktemp("tokenizer") / "t.gguf")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_what_the_template_makes_of_the_dialogue(named, name):
    _, tokenizer = named
    tokenizer.chat_template = TEMPLATES[name]
    for input, target in SAMPLES:
        question = {"role": "user", "content": input}
        talk = [question, {"role": "assistant", "content": target}]
        encoded = encode([Example(input, target, CHAT)], tokenizer, 512)
        wanted = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
        assert encoded.ids[0].tolist() == wanted
        asked = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=True, return_dict=True)
        before, read = asked["input_ids"], int(encoded.prompt_lengths[0])
        if name != "taken-back" and wanted[: len(before)] == before:
            assert read == len(before)
        scored = tokenizer.decode(wanted[read:])
        assert target in scored
        assert input not in scored
        assert "assistant" not in scored


def test_a_turn_ends_as_the_template_ends_it():
    tokenizer = tokenizer_kinds.DECODERS["bytes-bos"](None)
    ends = {
        "gemma": "<end_of_turn>\n", "phi3": "<|end|>\n</s>", "chatml": "<|im_end|>\n", "llama2": " </s>",
        "zephyr": "</s>\n", "thinking": "<|im_end|>\n", "no-end": "\n", "taken-back": "</s>",
    }  # fmt: skip
    for name, end in ends.items():
        tokenizer.chat_template = TEMPLATES[name]
        encoded = encode([Example("hi", "yo", CHAT)], tokenizer, 512)
        scored = tokenizer.decode(encoded.ids[0][int(encoded.prompt_lengths[0]) :].tolist())
        # A space that the template ends its question with is one token with the answer's first word.
        before = {"llama2": " ", "no-end": " ", "thinking": "<think>\n\n</think>\n\n"}.get(name, "")
        assert scored == f"{before}yo{end}"
        assert encoded.target_bytes == 2


def test_an_encoder_decoder_is_asked_by_the_template_and_writes_the_target():
    tokenizer = tokenizer_kinds.ENCODER_DECODERS["bytes-eos"](None)
    tokenizer.chat_template = TEMPLATES["chatml"]
    encoded = encode([Example("hi", "yo", CHAT)], tokenizer, 512, separate=True)
    read = int(encoded.prompt_lengths[0])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert encoded.ids[0][:read].tolist() == asked["input_ids"]
    assert encoded.ids[0][read:].tolist() == tokenizer(text_target="yo")["input_ids"]


def test_bytes_of_a_cut_answer_are_counted():
    tokenizer = tokenizer_kinds.DECODERS["bytes-bos"](None)
    tokenizer.chat_template = TEMPLATES["thinking"]
    example = Example("rear", "word and house", CHAT)
    whole = encode([example], tokenizer, 512)
    text = tokenizer.decode(whole.ids[0])
    for most in range(int(whole.prompt_lengths[0]) + 1, len(whole.ids[0])):
        cut = encode([example], tokenizer, most)
        kept = len(tokenizer.decode(whole.ids[0][:most])) - text.index("word")
        assert cut.target_bytes == min(max(kept, 0), len("word and house"))


BROKEN = {
    "{{ raise_exception('System role not supported') }}": r"fails \(TemplateError: System role not supported\)",
    "{{ nope.x.y }}": r"fails \(UndefinedError: 'nope' is undefined\)",
    "{% for %}": r"fails \(TemplateSyntaxError: ",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": r"fails \(SecurityError: ",
    "{{ 1 + 'a' }}": r"fails \(TypeError: ",
    "{{ 1 / 0 }}": r"fails \(ZeroDivisionError: division by zero\)",
    "{% for i in range(10**9) %}x{% endfor %}": r"fails \(OverflowError: ",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": r"fails \(RecursionError: ",
    "": "does not write the answer 'yo' as it is",
    "{{ messages[0].content }}": "does not write the answer 'yo' as it is",
    "{{ messages[-1].content | upper }}": "does not write the answer 'yo' as it is",
}


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_fails_is_one_message_with_the_candidates_name(template):
    tokenizer = tokenizer_kinds.DECODERS["bytes"](None)
    tokenizer.chat_template, tokenizer.name_or_path = template, "models/one"
    expected = rf"--template chat: the chat template of a candidate's tokenizer \(models/one\) {BROKEN[template]}"
    with pytest.raises(InputError, match=expected) as error:
        encode([Example("hi", "yo", CHAT)], tokenizer, 64)
    assert "\n" not in str(error.value)
    assert "leave this candidate out" in str(error.value)


def test_a_template_without_an_end_is_stopped(monkeypatch):
    looks = itertools.count()
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: next(looks) / 50_000))
    tokenizer = tokenizer_kinds.DECODERS["bytes"](None)
    tokenizer.name_or_path = "models/one"
    tokenizer.chat_template = (
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{{ messages[-1].content }}"
    )
    before = sys.gettrace()
    with pytest.raises(InputError, match=r"\(models/one\) had not ended after 10 seconds"):
        encode([Example("hi", "yo", CHAT)], tokenizer, 64)
    assert abs(next(looks) - 10.02 * 50_000) < 5  # at the first look after the limit
    assert sys.gettrace() is before


def test_a_gguf_file_is_named_too(tmp_path):
    tokenizer = tokenizer_kinds.gguf_llama(tmp_path / "t.gguf", chat="{{ 1 / 0 }}")
    with pytest.raises(InputError, match=r"\(.*t\.gguf\) fails \(ZeroDivisionError"):
        encode([Example("hi", "yo", CHAT)], tokenizer, 64)


def test_without_jinja2_it_says_what_to_install(monkeypatch):
    tokenizer = tokenizer_kinds.DECODERS["bytes"](None)
    tokenizer.chat_template = TEMPLATES["chatml"]

    def refuse(*arguments, **options):
        raise ImportError("apply_chat_template requires jinja2 to be installed.")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", refuse)
    with pytest.raises(InputError, match=r"--template chat: needs jinja2 .*pip install jinja2"):
        encode([Example("hi", "yo", CHAT)], tokenizer, 64)
