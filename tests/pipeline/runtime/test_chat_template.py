"""A template renders as transformers does it, and harms nobody whatever it is."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from pipeline.errors import InputError
from pipeline.runtime import chat_template as module
from pipeline.runtime.chat_template import _ChatTemplate, checked_messages
from pipeline.runtime.tokenizer import chat_prompt_ids, load_tokenizer
from tests.support.tiny_decoder import byte_tokenizer

CHAT = [{"role": "user", "content": "hi é\u2028"}]
LIKE_TRANSFORMERS = [
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}",
    "{{ bos_token }}{{ mask_token }}{{ cls_token }}{{ image_token }}{{ audio_token }}{{ weird }}",
    "{{ foo_token }}{{ baz_token }}{{ odd_token }}{{ additional_special_tokens }}{{ unk_token }}",
    "{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "{% set n = namespace(found=false) %}{% set n.found = true %}{{ n.found }}{{ dict(a=1) }}",
    "{{ strftime_now('%Y %Z') }}",
    "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}i{% endfor %}",
]


def render(source: str, chat: list[dict[str, str]] = CHAT) -> str:
    return _ChatTemplate(source).render(chat, True, {})


@pytest.fixture(scope="module", params=["new", "legacy"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer files that name special tokens in every way there is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "mask_token": "<m>",
        "image_token": "<img>",
        "foo_token": {"content": "<no AddedToken>"},
        "baz_token": {"__type": "AddedToken", "content": "<baz>"},
        "additional_special_tokens": ["<a>", "<b>"],
        "extra_special_tokens": {"audio_token": "<aud>", "weird": "<w>"},
    }
    if request.param == "new":
        settings["added_tokens_decoder"] = {}
    path.write_text(json.dumps(settings))
    legacy = {"cls_token": {"content": "<cls>"}, "odd_token": "<odd>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(legacy))
    return folder


@pytest.mark.parametrize("source", LIKE_TRANSFORMERS)
def test_a_template_sees_and_says_what_it_does_in_transformers(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert ours.special_tokens_map == theirs.special_tokens_map
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert chat_prompt_ids(ours, CHAT) == ours.encode(expected, add_special_tokens=False)
    assert chat_prompt_ids(theirs, CHAT) == theirs.encode(expected, add_special_tokens=False)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[-1].content.index('needle') }}", "substring not found"),
        ("{{ 1/0 }}", "division by zero"),
        ("{{ 'a'+1 }}", "TypeError"),
        ("{{ (10.0)**1000 }}", "OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ range(1000000) | list }}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('own ' * 1000) }}", "own own"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * 10**9 }}", "MiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "MiB of memory"),
        ("{{ messages[0].content | center(10**9) }}", "MiB of memory"),
        ("{% for a in range(99999) %}{{ 'b' * 99 }}{% endfor %}", "longer than"),
        ("{% for", "end of template"),
        ("{% nonsense %}", "unknown tag"),
    ],
)
def test_a_failing_template_is_a_bad_input_in_its_own_words(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        render(source)
    assert len(str(raised.value)) < 1200


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = 9 %}{{ n**(n**n) }}",  # one operation, which nothing of Python's interrupts
    ],
)
def test_a_template_without_end_is_ended_and_the_next_conversation_is_rendered(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROCESSOR_S", 0.3)
    template = _ChatTemplate("{% if messages|length > 1 %}" + source + "{% endif %}fine")
    with pytest.raises(InputError, match="s of the processor"):
        template.render(CHAT * 2, True, {})
    assert template.render(CHAT, True, {}) == "fine"


def test_waiting_costs_a_template_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WALL_S", 0.5)
    template = _ChatTemplate("{{ messages[0].content }}")
    for _ in range(2):
        assert template.render(CHAT, True, {}) == CHAT[0]["content"]
        time.sleep(0.7)


def test_what_makes_much_of_much_is_no_fault() -> None:
    long = "é\n" * 1_000_000
    source = "{{ messages[0].content }}{{ messages[0].content | tojson }}"
    assert len(render(source, [{"role": "user", "content": long}])) == 2 * len(long) + 10**6 + 2


def test_threads_get_their_own_texts() -> None:
    template = _ChatTemplate("{{ messages[0].content }}")
    wrong = []

    def ask(name: str) -> None:
        for _ in range(20):
            text = template.render([{"role": "user", "content": name}], True, {})
            wrong.extend([] if text == name else [text])

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_its_process_ends_with_the_template() -> None:
    template = _ChatTemplate("x")
    template.render(CHAT, True, {})
    assert template._child is not None
    pid = template._child.pid
    del template
    gc.collect()
    assert not psutil.pid_exists(pid)


def test_a_template_that_does_not_compile_fails_chats_only(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for")
    tokenizer = load_tokenizer(folder)
    assert chat_prompt_ids(tokenizer, CHAT, raw=True) == tokenizer.encode(CHAT[0]["content"])
    with pytest.raises(InputError, match="broken"):
        chat_prompt_ids(tokenizer, CHAT)


def test_half_a_character_out_of_a_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(r"{{ '\ud83d' }}")
    with pytest.raises(InputError, match=r"U\+D83D"):
        chat_prompt_ids(load_tokenizer(folder), CHAT)


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hi", "type str"),
        ([], "nothing"),
        (None, "nothing"),
        (["hi"], r"messages\[0\]"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\].content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": b"hi"}], "type bytes"),
        ([{"content": "hi"}], "role"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}], "content"),
        ([{"role": "user", "content": "\udcff"}], "byte 0xff at 0"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, where: str) -> None:
    with pytest.raises(InputError, match=where):
        checked_messages(messages)


def test_parts_of_type_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert checked_messages([{"role": "user", "content": parts, "name": "x"}]) == [
        {"role": "user", "content": "ab", "name": "x"}
    ]
