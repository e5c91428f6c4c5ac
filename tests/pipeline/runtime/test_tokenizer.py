"""The light tokenizer gives what transformers gives, or leaves the work to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.errors import InputError
from pipeline.runtime import tokenizer_limits as module
from pipeline.runtime.tokenizer import (
    _FolderTokenizer,
    chat_prompt_ids,
    load_tokenizer,
    stop_token_ids,
)
from tests.support.tiny_decoder import byte_tokenizer

TEXTS = ["", "plain", "Grüße, 世界 🙂", " two  blanks ", "<s>special</s>"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Say "hé"'}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'system' %}[{{ m.content }}]"
    "{% else %}{{ m | tojson }}{% endif %}{% if loop.last %}{% break %}{% endif %}\n"
    "{% endfor %}{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_ids_and_text_equal_those_of_transformers(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(ours, _FolderTokenizer)
    assert ours.eos_token_id == theirs.eos_token_id
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_a_template_renders_as_in_transformers(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    assert isinstance(ours, _FolderTokenizer)
    for opened in (True, False):
        text = ours.apply_chat_template(CHAT, add_generation_prompt=opened, tokenize=False)
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=opened, tokenize=False)
        assert text == expected


def test_a_template_may_stand_in_the_settings(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "d"}]
    for template, expected in (("{{ messages[0].role }}", "system"), (named, "d")):
        path.write_text(json.dumps(settings | {"chat_template": template}))
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, _FolderTokenizer)
        text = tokenizer.apply_chat_template(CHAT, add_generation_prompt=False, tokenize=False)
        assert text == expected


def test_a_template_that_refuses_says_why(folder: Path) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="roles must alternate"):
        chat_prompt_ids(load_tokenizer(folder), CHAT)


def test_a_template_cannot_leave_its_sandbox(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(InputError, match="refuses"):
        chat_prompt_ids(load_tokenizer(folder), CHAT)


def test_without_a_template_the_message_says_what_to_do(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="--raw"):
        chat_prompt_ids(load_tokenizer(folder), CHAT)


def test_what_transformers_adds_by_itself_is_left_to_it(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}))
    assert not isinstance(load_tokenizer(folder), _FolderTokenizer)


def test_stop_ids_are_those_that_transformers_takes(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert stop_token_ids(tokenizer, folder) == {tokenizer.eos_token_id}
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 9}}')
    assert stop_token_ids(tokenizer, folder) == {9}
    (folder / "config.json").write_text('{"eos_token_id": [3, 4, 257]}')
    assert stop_token_ids(tokenizer, folder) == {3, 4, 257}
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    assert stop_token_ids(tokenizer, folder) == {3, 4, 257}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert stop_token_ids(tokenizer, folder) == {5, 7}


@pytest.mark.parametrize("ids", ['"x"', "[[1]]", "true", "-1", '{"a": 1}'])
def test_stop_ids_that_are_no_ids_are_refused(folder: Path, ids: str) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(InputError, match="eos_token_id"):
        stop_token_ids(load_tokenizer(folder), folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(InputError, match="does not load"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '"x"'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"bos_token": {"content": null}}'),
        ("tokenizer_config.json", '{"chat_template": [5]}'),
        ("chat_template.json", "[]"),
        ("chat_template.json", '{"chat_template": 5}'),
        ("generation_config.json", "[]"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[" * 200_000),
        ("generation_config.json", '{"eos_token_id": [{}]}'),
        ("generation_config.json", '{"eos_token_id": true}'),
        ("generation_config.json", '{"eos_token_id": ' + "9" * 5000 + "}"),
    ],
)
def test_settings_of_another_type_are_refused_by_the_name_of_the_file(
    folder: Path, name: str, content: str
) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=name):
        stop_token_ids(load_tokenizer(folder), folder)


def test_loading_needs_neither_torch_nor_transformers(folder: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from pipeline.runtime.tokenizer import *; "
        f"t = load_tokenizer(Path({str(folder)!r})); "
        "chat_prompt_ids(t, [{'role': 'user', 'content': 'x'}]); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def changed(folder: Path, **changes: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def replace(pattern: str, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_rules_that_multiply_a_text_do_not_load(folder: Path, part: str) -> None:
    steps = [replace("a", "a" * 1000)] * 3
    listed = {"type": "Sequence", part + "s": steps}
    with pytest.raises(InputError, match="times as long"):
        load_tokenizer(changed(folder, **{part: listed}))


def test_rules_of_ordinary_tokenizers_load(folder: Path) -> None:
    steps = [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"), {"type": "NFKC"}]
    changed(folder, normalizer={"type": "Sequence", "normalizers": steps})
    assert load_tokenizer(folder).encode("a")


def test_a_panic_of_the_library_is_a_bad_input(folder: Path) -> None:
    split: dict[str, object] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
    }
    split |= {"invert": False}
    tokenizer = load_tokenizer(changed(folder, pre_tokenizer=split))
    assert tokenizer.encode("aa") is not None
    with pytest.raises(InputError, match="fails on this text"):
        tokenizer.encode("a" * 40 + "b")


def test_a_tokenizer_that_does_not_load_for_a_panic_is_named(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    changed(folder, model=model | {"continuing_subword_prefix": "x" * 50, "merges": [["a", "b"]]})
    with pytest.raises(InputError, match="does not load"):
        load_tokenizer(folder)


def test_a_text_that_the_tokenizer_does_not_end_with_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ENCODE_S", 0.05)
    monkeypatch.setattr(module, "_CHARACTERS_PER_S", 1e9)
    with pytest.raises(InputError, match="no end"):
        load_tokenizer(folder).encode("hello world " * 200_000)


@pytest.mark.parametrize("text", ["\ud83d", b"bytes", None])
def test_what_is_no_text_is_refused(folder: Path, text: object) -> None:
    with pytest.raises(InputError, match=r"no text|not text"):
        load_tokenizer(folder).encode(text)  # type: ignore[arg-type]
